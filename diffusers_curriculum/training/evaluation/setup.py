"""From a command line to an evaluator: the training images and the feature networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusers_curriculum.metrics.choices import metrics_by_network, networks_of
from diffusers_curriculum.metrics.features import load_feature_network
from diffusers_curriculum.metrics.preprocessing import FeatureNetworkError
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.checks import describe, sample_name
from diffusers_curriculum.training.data.transforms import ImageTransform, decode_image
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.evaluation.evaluator import Evaluator, Images

if TYPE_CHECKING:
    from datasets import Dataset


def training_images(
    rows: Dataset, resolution: int, interpolation: str, image_column: str = "image"
) -> Images:
    """Return what reads training images by row, cropped in the middle and not mirrored.

    Args:
        rows: with undecoded images.

    Raises:
        UsageError: on reading, for an image that does not decode, with its path.
    """
    transform = ImageTransform(resolution, interpolation, center_crop=True)

    def read(row: int) -> Tensor:
        cell = rows[row][image_column]
        try:
            return transform(decode_image(cell), 0.0, 0.0, 1.0)
        # A file may have changed since the check; whatever the decoder raises, name the file.
        except Exception as error:
            raise UsageError(f"{sample_name(cell, row)}: {describe(error)}") from error

    return lambda numbers: (torch.stack([read(row) for row in numbers]) + 1) / 2


def make_evaluator(
    args: Arguments,
    accelerator: Any,
    real: Images,
    real_count: int,
    seed: int,
    last_step: int | None = None,
    guidance_scale: float | None = None,
) -> Evaluator | None:
    """Return the evaluator of a checked command line, None where no metrics are asked for; the
    arguments are those of :class:`Evaluator`, ``real`` as from ``training_images``.

    Raises:
        UsageError: too few training images, or a network that cannot be had: the metric, what is
            missing and the remedy.
    """
    if args.eval_steps is None:
        return None
    network_of = networks_of(args.eval_metrics, args.eval_feature_model)
    networks, weights = {}, args.eval_feature_weights
    for name, metrics in metrics_by_network(network_of).items():
        try:
            with accelerator.local_main_process_first():  # it downloads, the others wait
                networks[name] = load_feature_network(name, inception_weights=weights)
        except FeatureNetworkError as error:
            raise UsageError(f"--eval_metrics {' '.join(metrics)}: {error}") from error
    run: dict[str, Any] = {"last_step": last_step, "guidance_scale": guidance_scale}
    return Evaluator(args, accelerator, networks, network_of, real, real_count, seed=seed, **run)
