"""Loading the parts of a Stable Diffusion pipeline: all with the same revision and variant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from packaging import version

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.sampling import with_prediction_type
from diffusers_curriculum.training.process.foreign_code import refuse_foreign_code

# The keyword of from_pretrained; diffusers renamed it and deprecated the old name.
DTYPE = "dtype" if version.parse(diffusers.__version__) >= version.parse("0.40") else "torch_dtype"


@dataclass
class Components:
    """The models of a text-to-image run; what is frozen is in the dtype of mixed precision."""

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any  # trained, float32


def load_schedulers(args: Arguments) -> tuple[Any, Any]:
    """The scheduler that adds noise in training, and the pipeline's own for sampling.

    The first is DDPM for variance preserving pipelines, as in diffusers' script, and the
    pipeline's own class for flow matching and EDM.
    """
    refuse_foreign_code(args.pretrained_model_name_or_path, args.revision)
    where = {"subfolder": "scheduler", "revision": args.revision}
    with _loading(args.pretrained_model_name_or_path, "scheduler"):
        config: Any = diffusers.DDPMScheduler.load_config(
            args.pretrained_model_name_or_path, **where
        )
        name = str(config.get("_class_name"))
        kind: Any = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            raise UsageError(f"the pipeline's scheduler class {name!r} is not in diffusers.")
        own: Any = kind.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]
    preserving = NoiseLevels.from_scheduler(own).family == "vp"
    return (diffusers.DDPMScheduler.from_config(config) if preserving else own), own


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
    return Components(tokenizer, text_encoder, vae, unet)


def averaged_unet(args: Arguments) -> Any:
    """The UNet whose weights an average starts from; None where it is the one that is trained."""
    if args.non_ema_revision == args.revision:
        return None
    return _model(diffusers.UNet2DConditionModel, args, "unet")


def final_pipeline(args: Arguments, unet: Any, prediction_type: str) -> Any:
    """The pipeline to keep: the base's own components in float32, with the trained UNet and a
    scheduler that knows what it predicts."""
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        unet=unet,
        revision=args.revision,
        variant=args.variant,
        use_safetensors=True,
        **{DTYPE: torch.float32},
    )
    pipeline.scheduler = with_prediction_type(pipeline.scheduler, prediction_type)
    return pipeline


def _model(
    kind: Any, args: Arguments, subfolder: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    # the dtype is always said: diffusers and transformers have different defaults
    where = {"revision": args.revision, "variant": args.variant, "subfolder": subfolder}
    where["use_safetensors"] = True  # never a pickle
    with _loading(args.pretrained_model_name_or_path, subfolder):
        return kind.from_pretrained(
            args.pretrained_model_name_or_path, **(where | overrides | {DTYPE: dtype})
        )


@contextmanager
def _loading(path: str, part: str) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError) as error:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r}: its {part} cannot be loaded ({error}). "
            "Give a Stable Diffusion pipeline's folder or Hub id, and check --revision, --variant."
        ) from error
