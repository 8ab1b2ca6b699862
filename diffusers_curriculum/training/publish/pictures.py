"""Pictures during and after training, from whatever weights are to be shown.

Nothing here draws from a global generator or changes a model's weights or mode for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL.Image import Image
from torch import Tensor, nn


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode inside the block and each back into its own mode after it."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def decoding_precisely(pipeline: Any) -> Any:
    """Let a pipeline decode in the precision of its autoencoder under any autocast: some overflow
    in float16, and the pictures are black."""
    vae = pipeline.vae

    def decode(latents: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return type(vae).decode(vae, latents.to(vae.dtype), *args, **options)

    vae.decode = decode
    return pipeline


def image_grid(images: Sequence[Image], prompts: Sequence[str]) -> Image:
    """One row of pictures per prompt, prompt by prompt; a ValueError says that they cannot be
    shared out among the prompts."""
    if not images or not prompts or len(images) % len(prompts):
        raise ValueError(f"{len(images)} pictures cannot fill {len(prompts)} rows of equal length")
    return make_image_grid(list(images), len(prompts), len(images) // len(prompts))
