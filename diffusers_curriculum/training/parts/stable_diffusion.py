"""Loading the parts of a Stable Diffusion pipeline: all with the same revision and variant."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from diffusers_curriculum.models.loading import DTYPE, load_pipeline, load_whole
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import OF_CONFIGS, UsageError
from diffusers_curriculum.training.levels.formulations import own_scheduler
from diffusers_curriculum.training.process.pipeline_files import components, variants
from diffusers_curriculum.training.storage.components import SavedPart
from diffusers_curriculum.training.storage.files import write_atomically

logger = logging.getLogger(__name__)

WEIGHTED = ("unet", "vae", "text_encoder")  # parts with weights
# Parts of a pipeline that are never trained, and what its index says besides.
FROZEN = (
    "vae",
    "text_encoder",
    "tokenizer",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)
_SETTINGS = ("requires_safety_checker",)


@dataclass
class Base:
    """What a run keeps of the pipeline that it begins with."""

    index: dict[str, Any]  # its model_index.json
    frozen: dict[str, SavedPart]  # by name


@dataclass
class Components:
    """The models of a text-to-image run; what is frozen is in the dtype of mixed precision."""

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any  # trained, float32
    base: Base | None = None  # what the pipeline keeps that all come from, if they come from one


def load_schedulers(args: Arguments) -> tuple[Any, Any]:
    """The scheduler that adds noise in training, and the pipeline's own for sampling.

    The first is DDPM for variance preserving pipelines, as in diffusers' script, and the
    pipeline's own class for flow matching and EDM.
    """
    path, own = args.pretrained_model_name_or_path, own_scheduler(args)
    if NoiseLevels.from_scheduler(own).family != "vp":
        return own, own
    where = {"subfolder": "scheduler", "revision": args.revision}
    return diffusers.DDPMScheduler.from_pretrained(path, **where), own


def check_variant(args: Arguments) -> None:
    """Refuse a --variant that no part has files of, and tell which parts are loaded without it."""
    path = args.pretrained_model_name_or_path
    for revision in {args.revision, args.non_ema_revision}:
        kinds = variants(path, revision, args.variant, WEIGHTED)
        plain = [part for part, variant in kinds.items() if variant != args.variant]
        if plain:
            logger.info("--variant %s: %s come without it.", args.variant, " and ".join(plain))


def load_tokenizer(args: Arguments) -> Any:
    """The CLIP tokenizer of the pipeline."""
    path, revision = args.pretrained_model_name_or_path, args.revision
    with _loading(path, "tokenizer"):
        tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(
            path, subfolder="tokenizer", revision=revision
        )
        # Where files are missing, transformers makes an empty tokenizer: all captions look alike.
        words = len(tokenizer) - len(tokenizer.all_special_ids)
        if words <= 0 or tokenizer.model_max_length >= 10**6:
            raise OSError("its vocabulary or tokenizer_config.json is missing")
        return tokenizer


def load_components(
    args: Arguments, tokenizer: Any, device: torch.device, frozen_dtype: torch.dtype
) -> Components:
    """Load the models onto ``device``; the UNet trains in float32, the rest is frozen."""
    text_encoder = _model(transformers.CLIPTextModel, args, "text_encoder", frozen_dtype)
    vae = _model(diffusers.AutoencoderKL, args, "vae", frozen_dtype)
    unet = _model(diffusers.UNet2DConditionModel, args, "unet", revision=args.non_ema_revision)
    for frozen in (text_encoder, vae):
        frozen.requires_grad_(False).eval().to(device)
    unet.requires_grad_(True).train().to(device)
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return Components(tokenizer, text_encoder, vae, unet, open_base(args))


def averaged_unet(args: Arguments) -> Any:
    """The UNet whose weights an average starts from; None where it is the one that is trained."""
    if args.non_ema_revision == args.revision:
        return None
    return _model(diffusers.UNet2DConditionModel, args, "unet")


def base_folder(args: Arguments) -> Path:
    """The folder of the base pipeline; one of the Hub is fetched, but for its UNet."""
    path = args.pretrained_model_name_or_path
    if Path(path).is_dir():
        return Path(path)
    where = {"revision": args.revision, "variant": args.variant, "use_safetensors": True}
    with _loading(path, "parts"):
        folder: Any = diffusers.StableDiffusionPipeline.download(path, unet=None, **where)
        return Path(folder)


def open_base(args: Arguments) -> Base:
    """What the exported pipeline takes over from the base, read and opened now, as the folder may
    not be there at the end."""
    path = args.pretrained_model_name_or_path
    kind: Any = diffusers.StableDiffusionPipeline
    with _loading(path, "parts"):
        folder = base_folder(args)
        index = dict(kind.load_config(folder))
        names = [name for name in components(index) if name in FROZEN]
        return Base(index, {name: SavedPart(folder / name, args.variant) for name in names})


def save_pipeline(base: Base, unet: Any, scheduler: Any, output: Path) -> Callable[[], Any]:
    """Write the pipeline to keep: the trained UNet, a scheduler that knows what it predicts, and
    the frozen parts as they are in the base, file by file.

    Returns:
        What loads it, in float32 around the UNet in memory.
    """
    kind: Any = diffusers.StableDiffusionPipeline
    unet.save_pretrained(output / "unet")
    scheduler.save_pretrained(output / "scheduler")
    for name, part in base.frozen.items():
        part.copy(output / name)
    kept = {name: base.index[name] for name in (*base.frozen, *_SETTINGS) if name in base.index}
    kept |= {name: [None, None] for name in FROZEN if name not in base.frozen}
    trained = {"unet": unet, "scheduler": scheduler}
    kept |= {name: ["diffusers", type(part).__name__] for name, part in trained.items()}
    kept |= {"_class_name": kind.__name__, "_diffusers_version": diffusers.__version__}
    write_atomically(output / kind.config_name, json.dumps(kept, indent=2, sort_keys=True) + "\n")
    return partial(load_pipeline, kind, output, unet=unet)


def _model(
    kind: Any, args: Arguments, part: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    # the dtype is always said: diffusers and transformers have different defaults
    path = args.pretrained_model_name_or_path
    where = {"revision": args.revision, "subfolder": part, DTYPE: dtype} | overrides
    where["variant"] = variants(path, where["revision"], args.variant, WEIGHTED)[part]
    with _loading(path, part):
        return load_whole(kind, path, **where)[0]


@contextmanager
def _loading(path: str, part: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, *OF_CONFIGS) as error:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r}: its {part} cannot be loaded ({error}). "
            "Give a Stable Diffusion pipeline's folder or Hub id, and check --revision, --variant."
        ) from error
