"""Flags that the text-to-image scripts share."""

from __future__ import annotations

from typing import Any

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.data_config import (
    DATA_CONFIG,
    check_sources,
    settle_sources,
)
from diffusers_curriculum.training.arguments.flag import (
    NOT_NEGATIVE,
    SHARE,
    Family,
    Need,
    count,
    place,
    sharing,
    tracked,
)

_WANTED = "a folder of images and a metadata file (metadata.jsonl or metadata.csv) of captions"
_CAPTIONED = Need(
    "captions in the data (drop --instance_prompt)", lambda a: a.instance_prompt is None
)
PROMPTED = Need("--validation_prompt", lambda a: a.validation_prompt is not None)


def _check_pipeline(args: Any) -> None:
    environment.check_folder(args, "pretrained_model_name_or_path", "a saved pipeline")


MODEL = Family.of(
    "model",
    place(
        "pretrained_model_name_or_path",
        help="pipeline to fine-tune: a repository on the Hub or a local folder",
        required=True,
    ),
    tracked("revision", str, help="branch, tag or commit of that repository"),
    tracked("variant", str, help="variant of its weight files, such as fp16"),
    setting="model",
    check_machine=_check_pipeline,
)
CAPTIONS = Family.of(
    "data",
    tracked(
        "caption_column",
        str,
        "text",
        "column with the captions",
        setting="dataset",
        needs=(_CAPTIONED,),
    ),
    DATA_CONFIG,
    settle=settle_sources,
    check=check_sources,
    check_machine=lambda args: environment.check_data(args, _WANTED),
)
NOISE = Family.of(
    "objective",
    tracked("noise_offset", float, 0, "scale of noise shared by a channel", bound=NOT_NEGATIVE),
    setting="objective",
)
CLIP_SCORE = place(
    "validation_clip_score",
    help="CLIP model that tells how well the pictures fit their prompts, such as "
    "openai/clip-vit-large-patch14: a repository on the Hub or a folder",
    metavar="MODEL",
)


def check_clip_score(args: Any) -> None:
    """Refuse a folder that is not there."""
    environment.check_folder(
        args, "validation_clip_score", "a CLIP model that save_pretrained wrote"
    )


# Of one prompt, as in all of diffusers' scripts but train_text_to_image.py
PICTURES = Family.of(
    "validation",
    tracked("validation_prompt", str, help="prompt drawn from time to time"),
    count("num_validation_images", 4, "pictures of it", most=10_000),
    count("validation_epochs", 1, "epochs between validations"),
    *sharing(CLIP_SCORE, needs=PROMPTED),
    check_machine=check_clip_score,
)
MEMORY = Family.of(
    "memory",
    tracked(
        "cache_text_embeddings",
        help="encode every caption once, keep that on disk, and free the text encoders",
    ),
    place(
        "text_cache_dir",
        help="folder for that (default: captions in --output_dir)",
        needs=(Need("--cache_text_embeddings", lambda a: a.cache_text_embeddings),),
    ),
    tracked("offload", help="autoencoder and text encoders wait on the host until they are used"),
)
DROPOUT = Family.of(
    "further options",
    tracked(
        "caption_dropout", float, 0.0, "share of captions left empty", bound=SHARE, setting="images"
    ),
)
