"""Tiny real parts: autoencoders, networks and schedulers, from configs and seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    VQModel,
)

from diffusers_curriculum.models.image_tokens import ImageTokenTransformer
from diffusers_curriculum.models.networks import without_label_dropout
from diffusers_curriculum.models.vit_vq import ViTVQModel

RESOLUTION = 16


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def blocks(direction: str, count: int = 2) -> tuple[str, ...]:
    kinds = {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}
    return (kinds[direction],) * count


def tiny_kl(**changes: Any) -> Any:
    layout: dict[str, Any] = {
        "down_block_types": blocks("down"),
        "up_block_types": blocks("up"),
        "block_out_channels": (8, 8),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": RESOLUTION,
        "scaling_factor": 0.5,
    }
    return seeded(lambda: AutoencoderKL(**layout | changes))


def tiny_vq(**changes: Any) -> Any:
    layout: dict[str, Any] = {
        "down_block_types": blocks("down"),
        "up_block_types": blocks("up"),
        "block_out_channels": (8, 8),
        "latent_channels": 4,
        "num_vq_embeddings": 16,
        "norm_num_groups": 4,
        "scaling_factor": 0.7,
    }
    return seeded(lambda: VQModel(**layout | changes))


def tiny_vit(**changes: Any) -> Any:
    layout: dict[str, Any] = {"image_size": RESOLUTION, "patch_size": 4, "codebook_size": 16}
    for part in ("encoder", "decoder"):
        layout |= {f"{part}_dim": 16, f"{part}_depth": 1, f"{part}_heads": 2, f"{part}_mlp": 32}
    return seeded(lambda: ViTVQModel(**layout | {"codebook_dim": 8} | changes))


AUTOENCODERS: dict[str, Callable[[], Any]] = {
    "pixels": lambda: None,
    "AutoencoderKL": tiny_kl,
    "VQModel": tiny_vq,
    "ViTVQModel": tiny_vit,
}


def tiny_dit(classes: int = 1000, channels: int = 4, size: int = 8, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": size,
        "num_embeds_ada_norm": classes,
    }
    return without_label_dropout(seeded(lambda: DiTTransformer2DModel(**settings | changes)))


def tiny_unet(channels: int = 3, size: int = 8, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
    }
    return seeded(lambda: UNet2DModel(**settings | changes))


def tiny_token_transformer(**changes: Any) -> Any:
    """For the codes of `tiny_vit`, with logits that are far from equal."""
    settings: dict[str, Any] = {"codebook_size": 16, "num_positions": 16, "num_classes": 3}
    settings["model_args"] = {"n_layer": 2, "n_embd": 16, "n_head": 2, "initializer_range": 0.3}
    return seeded(lambda: ImageTokenTransformer(**settings | changes))


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "vp": DDIMScheduler,
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": EDMEulerScheduler,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
