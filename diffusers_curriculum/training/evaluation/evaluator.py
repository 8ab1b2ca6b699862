"""Metrics while training: how far generated images are from the training images.

Sample numbers decide everything, and batches begin at multiples of the batch size whatever the
number of processes: one process or two, and a resumed run, give the same numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.metrics.choices import value_names
from diffusers_curriculum.metrics.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffusers_curriculum.metrics.features import FeatureNetwork
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.evaluation.record import write_metrics
from diffusers_curriculum.training.evaluation.shares import chosen_rows, share

logger = logging.getLogger(__name__)

# (B,) numbers of samples to (B, 3, H, W) images in [0, 1]; the same numbers, the same images.
Images = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is computed, and when.

    Attributes:
        every: optimizer steps between evaluations.
        metrics: names from `METRICS`.
        samples: images generated; as many training images are looked at, or all if fewer.
        steps: denoising steps of each; noted beside the numbers, as is the guidance.
        batch_size: images generated, and read, at once.
        seed: chooses the training images, and the subsets of KID.
        last_step: evaluated too; None: unknown.
    """

    every: int
    metrics: tuple[str, ...]
    samples: int = 1000
    steps: int = 50
    guidance_scale: float | None = None
    batch_size: int = 32
    seed: int = 0
    last_step: int | None = None

    @classmethod
    def of(
        cls, args: Arguments, seed: int, last_step: int | None, guidance_scale: float | None
    ) -> EvaluationSettings:
        """The settings of a checked command line."""
        return cls(
            every=args.eval_steps,
            metrics=tuple(args.eval_metrics),
            samples=args.eval_samples,
            steps=args.eval_num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=args.eval_generation_batch_size,
            seed=seed,
            last_step=last_step,
        )


class Evaluator:
    """Compares generated images with training images through one or more feature networks.

    Between evaluations the networks wait in host memory, so that they take none from the training.

    Args:
        accelerator: for its device, processes and trackers.
        settings: what is computed, and when.
        networks: by name, as ``evaluation.setup.load_networks`` gives them.
        network_of: name of the network that each metric looks through.
        real: the training images, by row; called here, and not kept.
        real_count: number of rows.
        output_dir: where eval_metrics.jsonl is written.

    Raises:
        UsageError: too few training images, or a network that gives no finite features of them.
    """

    def __init__(
        self,
        accelerator: Any,
        settings: EvaluationSettings,
        networks: Mapping[str, FeatureNetwork],
        network_of: Mapping[str, str],
        real: Images,
        real_count: int,
        output_dir: str | Path,
    ) -> None:
        self.accelerator, self.settings = accelerator, settings
        self.networks, self.network_of = networks, network_of
        self.folder = Path(output_dir)
        rows = chosen_rows(real_count, settings.samples, settings.seed)
        self._check_counts(len(rows))
        self.real = self._features(lambda numbers: real([rows[n] for n in numbers]), len(rows))
        self.real_count = len(rows)
        self._check_features()

    def is_due(self, step: int) -> bool:
        """Whether the model is evaluated after ``step`` finished steps."""
        return step > 0 and (step % self.settings.every == 0 or step == self.settings.last_step)

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
        generated = self._features(generate, self.settings.samples)
        values = self._agreed(generated)
        self.accelerator.log({f"eval/{name}": x for name, x in values.items()}, step=step)
        if self.accelerator.is_main_process:
            shown = ", ".join(f"{name} {x:.4g}" for name, x in values.items())
            logger.info("step %d: %s (%d samples)", step, shown, self.settings.samples)
            write_metrics(self.folder, step, values, self._facts())
        return values

    def _facts(self) -> dict[str, Any]:
        return {
            "samples": self.settings.samples,
            "inference_steps": self.settings.steps,
            "guidance_scale": self.settings.guidance_scale,
            "training_images": self.real_count,
            "networks": dict(self.network_of),
        }

    def _check_counts(self, real: int) -> None:
        fewest = min(real, self.settings.samples)
        if fewest < 4:
            raise UsageError(
                f"{real} training images and --eval_samples {self.settings.samples} are too few "
                "for --eval_metrics: at least 4 of each, better thousands, or drop --eval_steps."
            )
        for metric in {"fid", "fd_dinov2"} & set(self.network_of):
            network = self.networks[self.network_of[metric]]
            if fewest <= network.dim and self.accelerator.is_main_process:
                logger.warning(
                    "%s from %d samples with the %d features of %s: the covariance is singular "
                    "and the distance too large; compare it only with runs of as many samples.",
                    metric,
                    fewest,
                    network.dim,
                    network.name,
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
        device, processes = self.accelerator.device, self.accelerator.num_processes
        plan = share(count, self.settings.batch_size, self.accelerator.process_index, processes)
        rows = plan.rows_per_process
        found = {
            name: torch.zeros(rows, network.dim, device=device)
            for name, network in self.networks.items()
        }
        for network in self.networks.values():
            network.to(device)
        done = 0
        for numbers in plan:
            batch = _as_many(images(numbers), len(numbers))
            for name, network in self.networks.items():
                found[name][done : done + len(numbers)] = self._seen(network, batch)
            done += len(numbers)
        for network in self.networks.values():
            network.to("cpu")
        gathered = {name: self.accelerator.gather(x) for name, x in found.items()}
        return {name: x[:count].cpu() for name, x in gathered.items()}

    def _seen(self, network: FeatureNetwork, batch: Tensor) -> Tensor:
        features = network(batch)
        if batch.is_floating_point():  # rounding to 8 bits would make a number of a NaN
            finite = batch.isfinite().flatten(1).all(1).to(features.device)
            features = torch.where(finite[:, None], features, math.nan)
        return features

    def _agreed(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        """Computed on the main process, which spares the others the time."""
        names = value_names(self.settings.metrics)
        broken = any(not bool(x.isfinite().all()) for x in generated.values())
        if broken:
            logger.warning("some generated images or their features are not finite: no metrics")
            return dict.fromkeys(names, math.nan)
        # The one backend without float64 has one process only, and need not agree with anyone.
        values = torch.zeros(len(names), dtype=torch.float64)
        if self.accelerator.is_main_process:
            found = self._values(generated)
            values = torch.tensor([found[name] for name in names], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return dict(zip(names, values.tolist(), strict=True))

    def _values(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        values: dict[str, float] = {}
        for metric, name in self.network_of.items():
            real, made = self.real[name], generated[name]
            if metric == "kid":
                values[metric] = kernel_distance(real, made, self.settings.seed)
            elif metric == "precision_recall":
                values |= precision_recall(real, made)._asdict()
            else:
                values[metric] = frechet_distance(real, made)
        return values


def _as_many(images: Tensor, count: int) -> Tensor:
    if len(images) != count:
        raise ValueError(f"{len(images)} images came for {count} samples; give one of each")
    return images
