"""Whether the parts of a Stable Diffusion pipeline fit one another, as their configs tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.formulations import pipeline_index
from diffusers_curriculum.training.process.pipeline_files import components, read_json_file

# The classes of the parts that are trained with.
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_REMEDY = "Give a Stable Diffusion pipeline, which makes images of captions alone."

Config = Mapping[str, Any]


def check_parts(args: Arguments) -> None:
    """Read the configs of the base pipeline; no weight is loaded.

    Raises:
        UsageError: a part is missing, of another class, or does not fit the others; the message
            names each of them.
    """
    path, revision, index = args.pretrained_model_name_or_path, args.revision, pipeline_index(args)
    faults = list(_class_faults(index))
    if not faults:
        unet = read_json_file(path, args.non_ema_revision, "unet/config.json")
        vae, encoder = (
            read_json_file(path, revision, f"{n}/config.json") for n in ("vae", "text_encoder")
        )
        _check_side(args, vae)
        faults = list(_misfits(unet, vae, encoder))
    if faults:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r}, a {index.get('_class_name')}, cannot be "
            f"trained by this script: {'; '.join(faults)}. {_REMEDY}"
        )


def _check_side(args: Arguments, vae: Config) -> None:
    """Refuse images of which the autoencoder makes less than 2 x 2 latents."""
    smallest = 2 ** len(vae.get("block_out_channels", (64,)))
    if args.resolution < smallest:
        raise UsageError(
            f"--resolution is {args.resolution}: the pipeline's autoencoder takes {smallest} or "
            "more."
        )


def check_tokenizer(args: Arguments, tokenizer: Any) -> None:
    """Refuse a tokenizer that makes what its text encoder has no embeddings for.

    Raises:
        UsageError: both numbers, and the remedy.
    """
    path = args.pretrained_model_name_or_path
    encoder = _own(read_json_file(path, args.revision, "text_encoder/config.json"))
    flag, words = f"--pretrained_model_name_or_path {path!r}", encoder.get("vocab_size", 49408)
    if len(tokenizer) > words:
        raise UsageError(
            f"{flag}: its tokenizer has {len(tokenizer)} tokens, and its text_encoder embeddings "
            f"for {words}: remove the tokens that were added, or save the pipeline after "
            "text_encoder.resize_token_embeddings(len(tokenizer))."
        )
    longest = encoder.get("max_position_embeddings", 77)
    if tokenizer.model_max_length > longest:
        raise UsageError(
            f"{flag}: its tokenizer's model_max_length is {tokenizer.model_max_length}, and its "
            f"text_encoder has {longest} positions: write {longest} into "
            "tokenizer/tokenizer_config.json."
        )


def _class_faults(index: Config) -> Iterator[str]:
    """Parts that are missing, or of a class that this script does not train with."""
    listed = components(dict(index))
    missing = [name for name in (*CLASSES, "scheduler") if name not in listed]
    if missing:
        yield f"it has no {' and no '.join(missing)}"
    for name, allowed in CLASSES.items():
        if name in listed and listed[name][1] not in allowed:
            yield f"its {name} is a {listed[name][1]}, and this script takes a {allowed[0]}"


def _misfits(unet: Config, vae: Config, encoder: Config) -> Iterator[str]:
    """What of the UNet does not fit the autoencoder and the text encoder; settings that a config
    leaves out have the defaults of diffusers and transformers."""
    latent = vae.get("latent_channels", 4)
    for name, does in (("in_channels", "takes"), ("out_channels", "gives")):
        if unet.get(name, 4) != latent:
            yield f"its unet {does} {unet[name]} channels, and its vae's latents have {latent}"
    yield from _conditions(unet)
    kind = encoder.get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        yield f"its text_encoder/config.json is one of {kind!r}, and this script takes a CLIP"
        return
    width = _own(encoder).get("hidden_size", 512)
    projected = unet.get("encoder_hid_dim")
    name = "cross_attention_dim" if projected is None else "encoder_hid_dim"
    wanted = unet.get(name, 1280)  # one for all blocks, or one each
    if any(each != width for each in (wanted if isinstance(wanted, list) else [wanted])):
        yield f"its unet's {name} is {wanted}, and its text_encoder gives {width} numbers a token"


def _conditions(unet: Config) -> Iterator[str]:
    """What a UNet wants to be told besides a caption."""
    allowed = {
        "addition_embed_type": (None, "text"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
    }
    for name, values in allowed.items():
        if unet.get(name) not in values:
            yield f"its unet's {name} is {unet[name]!r}: it wants more than a caption"


def _own(encoder: Config) -> Config:
    """The settings of the text half of a CLIP."""
    inner = encoder.get("text_config")
    return inner if encoder.get("model_type") == "clip" and isinstance(inner, Mapping) else encoder
