"""Pictures during and after training, from whatever weights are to be shown.

Nothing here draws from a global generator or changes a model's weights or mode for good.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL.Image import Image
from torch import nn

from diffusers_curriculum.training.levels.sampling import with_prediction_type

# training_utils and pipelines take seconds to import, which a wrong command line should not have to
# wait for: they are imported where they are used.

logger = logging.getLogger(__name__)

INFERENCE_STEPS = 20  # as in diffusers' train_text_to_image.py


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


def text_to_image_pipeline(
    *,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    unet: Any,
    scheduler: Any,
    prediction_type: str | None = None,
) -> Any:
    """A pipeline around unwrapped models that are in memory already; nothing is loaded."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=with_prediction_type(scheduler, prediction_type),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def validation_images(
    build_pipeline: Callable[[], Any],
    prompts: Sequence[str],
    *,
    seed: int | None,
    device: torch.device | str,
    images_per_prompt: int = 1,
    steps: int = INFERENCE_STEPS,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    guidance_scale: float | None = None,
) -> list[Image]:
    """Sample pictures for every prompt, ``images_per_prompt`` after one another.

    Every prompt starts from the same noise, so that a picture depends neither on the other prompts
    nor on the device; with no seed the noise is fresh each time.

    Args:
        build_pipeline: makes the pipeline; it is let go of, and memory freed, at the end.
        seed: of the generator, on the CPU.
        device: where the models are.
        autocast: the accelerator's ``autocast``.
        guidance_scale: None leaves the pipeline's own.
    """
    from diffusers.training_utils import free_memory

    pipeline = build_pipeline().to(device)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": steps}
    options |= {"num_images_per_prompt": images_per_prompt}
    options |= {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    noise_seed = torch.Generator().seed() if seed is None else seed
    images: list[Image] = []
    try:
        with evaluation_mode(*_modules(pipeline)), autocast():
            for prompt in prompts:
                generator = torch.Generator().manual_seed(noise_seed)
                images += pipeline(prompt, generator=generator, **options).images
    finally:
        del pipeline
        free_memory()
    return images


def _modules(pipeline: Any) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def image_grid(images: Sequence[Image], prompts: Sequence[str]) -> Image:
    """One row of pictures per prompt, in the order of ``validation_images``.

    Raises:
        ValueError: the pictures cannot be shared out among the prompts.
    """
    if not images or not prompts or len(images) % len(prompts):
        raise ValueError(f"{len(images)} pictures cannot fill {len(prompts)} rows of equal length")
    return make_image_grid(list(images), len(prompts), len(images) // len(prompts))


def log_images(
    accelerator: Any, tag: str, images: Sequence[Image], prompts: Sequence[str], step: int
) -> None:
    """Send pictures to the trackers that show them; others get one warning each.

    Args:
        accelerator: whose trackers are asked; only the main process sends.
        tag: "validation" during training, "test" at its end.
        images: prompt by prompt, as from ``validation_images``.
        step: the optimizer step.
    """
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
