"""Stable Diffusion 1.x and 2.x: a UNet told of captions by one CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_curriculum.models.tiny import MINUSCULE, make_tiny_pipeline
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.parts.components import Components, Source, check_variant
from diffusers_curriculum.training.parts.families.base import (
    FAMILIES,
    Conditioning,
    Config,
    ModelFamily,
    text_config,
)
from diffusers_curriculum.training.process.pipeline_files import variants

# What a UNet wants to be told besides a caption.
_ALLOWED = {
    "addition_embed_type": (None, "text"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}


@FAMILIES.register("sd")
class StableDiffusion(ModelFamily):
    """Stable Diffusion; the UNet may come from a revision of its own (--non_ema_revision)."""

    title = "a Stable Diffusion pipeline"
    pipeline, network = "StableDiffusionPipeline", "unet"
    parts: ClassVar = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    optional = ("safety_checker", "feature_extractor", "image_encoder")
    settings = ("requires_safety_checker",)
    absent: ClassVar = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")  # of train_text_to_image_lora.py
    tags = ("stable-diffusion", "stable-diffusion-diffusers")

    def source(self, args: Arguments, part: str) -> Source:
        source, revision = super().source(args, part), args.non_ema_revision
        if part != self.network:
            return source
        kinds = variants(source.path, revision, args.variant, self.weighted)
        return replace(source, revision=revision, variant=kinds[part])

    def misfits(self, configs: Mapping[str, Config]) -> Iterator[str]:
        unet, encoder = configs["unet"], configs["text_encoder"]
        yield from wrong_latents(unet, configs["vae"])
        yield from wants(unet, _ALLOWED)
        strange = list(no_clip("text_encoder", encoder))
        yield from strange
        if not strange:
            width = text_config(encoder).get("hidden_size", 512)
            yield from wrong_width(unet, width, "its text_encoder gives")

    def check_variant(self, args: Arguments) -> None:
        check_variant(args, {args.revision, args.non_ema_revision}, self.weighted)

    def encode_text(self, models: Components, tokens: Mapping[str, Tensor]) -> Conditioning:
        encoder = models.encoders["text_encoder"]
        states = encoder(tokens["input_ids"], return_dict=False)[0]
        return {"encoder_hidden_states": states}

    def predict(
        self, network: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        text = conditioning["encoder_hidden_states"]
        return network(noisy, timesteps, text, return_dict=False)[0]

    def kohya_name(self, module: str, network: Config) -> str | None:
        return f"lora_{module}".replace(".", "_")

    def save_tiny(self, folder: Path, seed: int = 0) -> None:
        make_tiny_pipeline(None, folder, resolution=16, seed=seed, sizes=MINUSCULE)

    def load_averaged(self, args: Arguments) -> Any:
        if args.non_ema_revision == args.revision:
            return None
        source = super().source(args, self.network)
        with source.loading(self.network, self.title):
            return source.load(self.part_class(self.network), torch.float32)


def wrong_latents(unet: Config, vae: Config) -> Iterator[str]:
    """What of a UNet's channels does not fit the autoencoder's latents."""
    latent = vae.get("latent_channels", 4)
    for name, does in (("in_channels", "takes"), ("out_channels", "gives")):
        if unet.get(name, 4) != latent:
            yield f"its unet {does} {unet[name]} channels, and its vae's latents have {latent}"


def no_clip(part: str, encoder: Config) -> Iterator[str]:
    """Whether the config of a text encoder is that of something else than a CLIP."""
    kind = encoder.get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        yield f"its {part}/config.json is one of {kind!r}, and this script takes a CLIP"


def wants(unet: Config, allowed: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """Settings by which a UNet wants to be told more than ``allowed``."""
    for name, values in allowed.items():
        if unet.get(name) not in values:
            yield f"its unet's {name} is {unet[name]!r}: it wants more than a caption"


def wrong_width(unet: Config, width: int, giving: str) -> Iterator[str]:
    """Whether a UNet attends to another number of features than the text encoders give."""
    projected = unet.get("encoder_hid_dim")
    name = "cross_attention_dim" if projected is None else "encoder_hid_dim"
    wanted = unet.get(name, 1280)  # one for all blocks, or one each
    if any(each != width for each in (wanted if isinstance(wanted, list) else [wanted])):
        yield f"its unet's {name} is {wanted}, and {giving} {width} numbers a token"
