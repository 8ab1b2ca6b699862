"""Drawing the class images that a folder lacks, before training."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from tqdm.auto import tqdm

from diffusers_curriculum.randomness import key
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.families.base import ModelFamily
from diffusers_curriculum.training.publish.pictures import decoding_precisely, evaluation_mode
from diffusers_curriculum.training.storage.files import write_atomically

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def draw_class_images(
    args: Arguments,
    family: ModelFamily,
    files: Mapping[int, Path],
    *,
    tokenizers: dict[str, Any],
    scheduler: Any,
    seed: int,
    device: torch.device,
) -> None:
    """Draw --class_prompt with the pipeline as it is, and write each image once it is drawn.

    The noise of an image is a function of (seed, number). The models are let go of after it.

    Args:
        files: of the images, by their numbers.
        scheduler: the pipeline's own.

    Raises:
        UsageError: the scheduler cannot draw, or a part cannot be loaded.
    """
    from diffusers.training_utils import free_memory  # here, as its import takes seconds

    if fault := family.sampling_fault(scheduler):
        raise UsageError(
            f"the pipeline's {type(scheduler).__name__} cannot draw class images ({fault}): put "
            f"{len(files)} more images into --class_data_dir {args.class_data_dir}."
        )
    logger.info("%d class images are drawn into %s", len(files), args.class_data_dir)
    Path(args.class_data_dir).mkdir(parents=True, exist_ok=True)
    dtype = _DTYPES.get(args.prior_generation_precision, _fast_dtype(device))
    models = family.load_components(args, tokenizers, device, dtype, frozen=True)
    own = type(scheduler).from_config(scheduler.config)  # drawing changes its steps
    pipeline = decoding_precisely(family.pipeline_of(models, models.network, own)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    numbers, settings = list(files), family.picture_settings(args)
    with evaluation_mode(*modules), tqdm(total=len(numbers), desc="Class images") as bar:
        for first in range(0, len(numbers), args.sample_batch_size):
            batch = numbers[first : first + args.sample_batch_size]
            noise = [_noise(seed, number) for number in batch]
            prompts = [args.class_prompt] * len(batch)
            images = pipeline(prompt=prompts, generator=noise, **settings).images
            for number, image in zip(batch, images, strict=True):
                write_atomically(files[number], _png(image))
            bar.update(len(batch))
    del models, pipeline, modules
    free_memory()


def _fast_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _noise(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(key(seed, number, purpose="class_image") >> 65)


def _png(image: Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
