"""Metrics while training: how far generated images are from the training images.

Sample numbers decide everything, and batches begin at multiples of the batch size whatever the
number of processes: one process or two, and a resumed run, give the same numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusers_curriculum.metrics.choices import metrics_by_network, networks_of, value_names
from diffusers_curriculum.metrics.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffusers_curriculum.metrics.features import FeatureNetwork, load_feature_network
from diffusers_curriculum.metrics.preprocessing import FeatureNetworkError
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.checks import decoded
from diffusers_curriculum.training.data.plan import chosen_rows, share
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.publish.metrics_record import MetricsRecord

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FILE_NAME = "eval_metrics.jsonl"

# (B,) numbers of samples to (B, 3, H, W) images in [0, 1]; the same numbers, the same images.
Images = Callable[[Sequence[int]], Tensor]


class Evaluator:
    """Compares generated images with training images through one or more feature networks.

    Between evaluations the networks wait in host memory, so that they take none from the training.

    Args:
        args: a checked command line: what is computed, and when.
        network_of: name of the network that each metric looks through.
        real: the training images, by row; called here, and not kept.
        real_count: number of rows.
        seed: agreed on by all processes; chooses the training images, and the subsets of KID.
        last_step: number of steps of the run, after which the model is evaluated too.
        facts: how images are generated, which is noted beside the numbers.

    Raises:
        UsageError: too few training images, or a network that gives no finite features of them.
    """

    def __init__(
        self,
        args: Arguments,
        accelerator: Any,
        networks: Mapping[str, FeatureNetwork],
        network_of: Mapping[str, str],
        real: Images,
        real_count: int,
        *,
        seed: int,
        last_step: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.args, self.accelerator, self.seed, self.last_step = args, accelerator, seed, last_step
        self.networks, self.network_of = networks, network_of
        self.record = MetricsRecord(accelerator, Path(args.output_dir, FILE_NAME), "eval")
        rows = chosen_rows(real_count, args.eval_samples, seed)
        self._check_counts(len(rows))
        self.real = self._features(lambda numbers: real([rows[n] for n in numbers]), len(rows))
        self._check_features()
        self.facts = {
            "samples": args.eval_samples,
            **(facts or {}),
            "training_images": len(rows),
            "networks": dict(network_of),
        }

    def is_due(self, step: int) -> bool:
        """Whether the model is evaluated after ``step`` finished steps."""
        return is_due(step, self.args.eval_steps, self.last_step)

    def evaluate(self, generate: Images, step: int) -> dict[str, float]:
        """Generate, compare, log under ``eval/`` and write the line of eval_metrics.jsonl.

        Args:
            generate: sample numbers 0 ... samples - 1 to images, of which this process asks for its
                share; models and modes are the caller's.

        Returns:
            The metrics by name, the same on every process; NaN, with a warning, where images or
            features were not finite.

        Raises:
            OSError: eval_metrics.jsonl could not be written.
        """
        values = self._agreed(self._features(generate, self.args.eval_samples))
        self.record.add(step, values, self.facts)
        return values

    def _check_counts(self, real: int) -> None:
        fewest = min(real, self.args.eval_samples)
        if fewest < 4:
            raise UsageError(
                f"{real} training images and --eval_samples {self.args.eval_samples} are too few "
                "for --eval_metrics: at least 4 of each, better thousands, or drop --eval_steps."
            )
        for metric in {"fid", "fd_dinov2"} & set(self.network_of):
            network = self.networks[self.network_of[metric]]
            if fewest <= network.dim and self.accelerator.is_main_process:
                logger.warning(
                    "%s from %d samples with the %d features of %s: the covariance is singular "
                    "and the distance too large; compare it only with runs of as many samples.",
                    *(metric, fewest, network.dim, network.name),
                )

    def _check_features(self) -> None:
        for name, features in self.real.items():
            if not bool(features.isfinite().all()):
                raise UsageError(
                    f"the feature network {name} gives features of the training images that are "
                    "not finite: give another one as --eval_feature_model."
                )

    def _features(self, images: Images, count: int) -> dict[str, Tensor]:
        """(count, dim) features per network, in the order of the sample numbers, on the CPU."""

        def seen(numbers: Sequence[int]) -> dict[str, Tensor]:
            batch = _in_colour(images(numbers))
            if len(batch) != len(numbers):
                raise ValueError(
                    f"{len(batch)} images came for {len(numbers)} samples; give one of each"
                )
            return {name: _seen(network, batch) for name, network in self.networks.items()}

        for network in self.networks.values():
            network.to(self.accelerator.device)
        dims = {name: network.dim for name, network in self.networks.items()}
        size = self.args.eval_generation_batch_size
        found = gathered_features(self.accelerator, count, size, dims, seen)
        for network in self.networks.values():
            network.to("cpu")
        return found

    def _agreed(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        """Computed on the main process, which spares the others the time."""
        names = value_names([*self.network_of])
        if not all(bool(x.isfinite().all()) for x in generated.values()):
            logger.warning("some generated images or their features are not finite: no metrics")
            return dict.fromkeys(names, math.nan)

        def compute() -> list[float]:
            found = self._values(generated)
            return [found[name] for name in names]

        values = of_main_process(self.accelerator, len(names), compute)
        return dict(zip(names, values, strict=True))

    def _values(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        values: dict[str, float] = {}
        for metric, name in self.network_of.items():
            real, made = self.real[name], generated[name]
            if metric == "kid":
                values[metric] = kernel_distance(real, made, self.seed)
            elif metric == "precision_recall":
                values |= precision_recall(real, made)._asdict()
            else:
                values[metric] = frechet_distance(real, made)
        return values


def is_due(step: int, every: int, last: int | None) -> bool:
    """Whether something is measured after ``step`` finished steps: ``every`` so many, and after the
    last."""
    return step > 0 and (step % every == 0 or step == last)


def of_main_process(
    accelerator: Any, count: int, compute: Callable[[], Sequence[float]]
) -> list[float]:
    """So many numbers that the main process computes, on all processes."""
    # The one backend without float64 has one process only, and need not agree with anyone.
    values = torch.zeros(count, dtype=torch.float64)
    if accelerator.is_main_process:
        values = torch.tensor(compute(), dtype=torch.float64)
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values.to(accelerator.device), "sum")
    return values.tolist()


def gathered_features(
    accelerator: Any,
    count: int,
    batch_size: int,
    dims: Mapping[str, int],
    seen: Callable[[Sequence[int]], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """By name, (count, dim) features of samples in the order of their numbers, on the CPU of every
    process; each computes those of its share.

    Args:
        batch_size: samples at once.
        seen: numbers of B samples to their features (B, dim) by name.
    """
    own, rows = share(count, batch_size, accelerator.process_index, accelerator.num_processes)
    found = {n: torch.zeros(rows, dim, device=accelerator.device) for n, dim in dims.items()}
    for first in range(0, len(own), batch_size):
        numbers = list(own[first : first + batch_size])
        for name, features in seen(numbers).items():
            found[name][first : first + len(numbers)] = features
    gathered = {name: accelerator.gather(features) for name, features in found.items()}
    return {name: features[:count].cpu() for name, features in gathered.items()}


def _in_colour(images: Tensor) -> Tensor:
    """Grey images (B, 1, H, W) with three channels, and those with alpha (B, 4, H, W) without."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def _seen(network: FeatureNetwork, batch: Tensor) -> Tensor:
    features = network(batch)
    if batch.is_floating_point():  # rounding to 8 bits would make a number of a NaN
        finite = batch.isfinite().flatten(1).all(1).to(features.device)
        features = torch.where(finite[:, None], features, math.nan)
    return features


def training_images(
    rows: Dataset, transform: ImageTransform, image_column: str = "image"
) -> Images:
    """Return what reads training images, undecoded in ``rows``, by row, cropped in the middle and
    not mirrored; it raises a UsageError with the path of an image that does not decode."""
    transform = replace(transform, center_crop=True, random_flip=False)

    def read(row: int) -> Tensor:
        return transform(decoded(rows[row][image_column], row, transform.decode), 0.0, 0.0, 1.0)

    return lambda numbers: (torch.stack([read(row) for row in numbers]) + 1) / 2


def make_evaluator(
    args: Arguments,
    accelerator: Any,
    real: Images,
    real_count: int,
    seed: int,
    last_step: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Evaluator | None:
    """Return the evaluator of a checked command line, None where no such metrics are asked for; the
    arguments are those of :class:`Evaluator`, ``real`` as from ``training_images``.

    Raises:
        UsageError: too few training images, or a network that cannot be had: the metric, what is
            missing and the remedy.
    """
    if args.eval_steps is None:
        return None
    network_of = networks_of(args.eval_metrics, args.eval_feature_model)
    if not network_of:
        return None
    networks, weights = {}, args.eval_feature_weights
    for name, metrics in metrics_by_network(network_of).items():
        try:
            with accelerator.local_main_process_first():  # it downloads, the others wait
                networks[name] = load_feature_network(name, inception_weights=weights)
        except FeatureNetworkError as error:
            raise UsageError(f"--eval_metrics {' '.join(metrics)}: {error}") from error
    run: dict[str, Any] = {"last_step": last_step, "facts": facts}
    return Evaluator(args, accelerator, networks, network_of, real, real_count, seed=seed, **run)
