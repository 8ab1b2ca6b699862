"""Pictures during and after training, from whatever weights are to be shown.

Nothing here draws from a global generator or changes a model's weights or mode for good.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL.Image import Image
from torch import Tensor, nn

logger = logging.getLogger(__name__)


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


def log_images(
    accelerator: Any, tag: str, images: Sequence[Image], prompts: Sequence[str], step: int
) -> None:
    """Send pictures, prompt by prompt, from the main process to the trackers that show them; others
    get one warning each. ``tag`` is "validation" during training and "test" at its end."""
    if not images or not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
            tracker.log_images({tag: stacked}, step=step, dataformats="NHWC")
        elif tracker.name in ("wandb", "swanlab"):
            # their trackers' log_images leaves no room for captions
            kind: Any = import_module(tracker.name).Image
            shown = zip(images, captions(images, prompts), strict=True)
            tracker.log({tag: [kind(image, caption=text) for image, text in shown]}, step=step)
        else:
            _warn_once(tracker.name)


def captions(images: Sequence[Image], prompts: Sequence[str]) -> list[str]:
    """The prompt of each picture, numbered through."""
    each = max(1, len(images) // max(1, len(prompts)))
    return [f"{i}: {prompts[i // each]}" for i in range(len(images))]


@cache
def _warn_once(tracker: str) -> None:
    logger.warning("tracker %r shows no pictures; use tensorboard, wandb or swanlab", tracker)
