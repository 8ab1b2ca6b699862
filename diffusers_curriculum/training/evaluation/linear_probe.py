"""How much a model's features tell of the classes of images: a linear classifier on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from diffusers_curriculum.training.data.plan import chosen_rows
from diffusers_curriculum.training.evaluation.evaluator import (
    gathered_features,
    is_due,
    of_main_process,
)
from diffusers_curriculum.training.publish.metrics_record import MetricsRecord
from diffusers_curriculum.training.publish.pictures import evaluation_mode

FILE_NAME = "linear_probe.jsonl"
_SEED = 0  # of the choice of samples, whatever the run's

# (B,) samples of a data loader to their features (B, D)
Features = Callable[[dict[str, Tensor]], Tensor]


class LinearProbe:
    """The accuracy of logistic regression on samples that are kept apart (arXiv 2110.04627, 4.3),
    from features and from the pixels themselves.

    Args:
        run: what a training step works with; its network without accelerate's wrappers.
        training, held_out: what a data loader would read, by row, with pixel_values (C, H, W) and
            label, and how many there are.
        features: of a batch, with the run's network.
        width: D of the features.
    """

    def __init__(
        self,
        run: Any,
        training: tuple[Any, int],
        held_out: tuple[Any, int],
        features: Features,
        width: int,
    ) -> None:
        self.run, self.features, self.width = run, features, width
        most = run.args.eval_samples
        self.samples = {
            name: (samples, chosen_rows(count, most, _SEED))
            for name, (samples, count) in (("training", training), ("held_out", held_out))
        }
        path = Path(run.args.output_dir, FILE_NAME)
        self.record = MetricsRecord(run.accelerator, path, "linear_probe")
        self._of_pixels: float | None = None

    def is_due(self, step: int) -> bool:
        """Whether it is fitted after ``step`` finished steps."""
        args = self.run.args
        return is_due(step, args.eval_steps, args.max_train_steps)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Fit it, log the accuracies under ``linear_probe/`` and write the line of the file.

        Returns:
            "features" and "pixels": shares in [0, 1]; the same on every process.

        Raises:
            OSError: linear_probe.jsonl could not be written.
        """
        if self._of_pixels is None:
            self._of_pixels = self._accuracy(lambda batch: batch["pixel_values"].flatten(1), None)
        with self.run.averages.shown(), evaluation_mode(self.run.network):
            values = {"features": self._accuracy(self.features, self.width)}
        values["pixels"] = self._of_pixels
        counts = {f"{name}_samples": len(rows) for name, (_, rows) in self.samples.items()}
        self.record.add(step, values, counts)
        return values

    def _accuracy(self, features: Features, width: int | None) -> float:
        seen = {name: self._seen(*told, features, width) for name, told in self.samples.items()}

        def compute() -> list[float]:
            return [_accuracy(*seen["training"], *seen["held_out"])]

        return of_main_process(self.run.accelerator, 1, compute)[0]

    def _seen(
        self, samples: Any, rows: Sequence[int], features: Features, width: int | None
    ) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of some samples."""
        args, accelerator = self.run.args, self.run.accelerator
        width = width or samples[rows[0]]["pixel_values"].numel()

        def seen(numbers: Sequence[int]) -> dict[str, Tensor]:
            batch = default_collate(samples.__getitems__([rows[number] for number in numbers]))
            sent = {name: values.to(accelerator.device) for name, values in batch.items()}
            return {"features": features(sent), "labels": sent["label"][:, None]}

        dims = {"features": width, "labels": 1}
        found = gathered_features(accelerator, len(rows), args.train_batch_size, dims, seen)
        return found["features"], found["labels"][:, 0].long()


def _accuracy(features: Tensor, labels: Tensor, others: Tensor, their_labels: Tensor) -> float:
    """The share of other samples whose label is told from their features."""
    if not (features.isfinite().all() and others.isfinite().all()):
        return math.nan
    from sklearn.linear_model import LogisticRegression  # here, as it takes a second
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(features.numpy(), labels.numpy())
    return float(probe.score(others.numpy(), their_labels.numpy()))
