"""The loss of codes that are kept apart, given those before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from diffusers_curriculum.training.evaluation.validation_loss import ValidationLoss


class CodeLoss(ValidationLoss):
    """The mean cross-entropy of the codes of each sample, in nats, and that of K equal parts of the
    positions in raster order; of the whole also in bits. See :class:`ValidationLoss`.

    Args:
        run: what a training step works with; its network without accelerate's wrappers.
        samples: what a data loader would read, by row.
        encode: ``(run, batch, draw) -> (codes (B, N), classes)``, of the script.
        predict: ``(run, codes, classes) -> logits (B, N, K)``.
    """

    def __init__(self, run: Any, samples: Any, count: int, encode: Any, predict: Any) -> None:
        super().__init__(run, samples, count, encode, predict)
        self.levels = torch.arange(len(run.sampler.levels))
        self.parts = torch.tensor_split(self.levels, len(self.names))

    def _values(self, weights: str) -> dict[str, float]:
        means = self._losses().double().cpu().mean(0)
        mean = float(means.mean())
        values = {weights: mean, f"{weights}_bits": mean / math.log(2)}
        each = {f"{weights}/from_position_{int(p[0])}": float(means[p].mean()) for p in self.parts}
        return values | each

    def _of_batch(self, rows: Sequence[int]) -> Tensor:
        """(B, N)."""
        batch = default_collate(self.samples.__getitems__(rows))
        codes, classes = self.encode(self.run, batch, None)
        logits: Any = self.predict(self.run, codes, classes)
        return self.run.loss(logits, codes, torch.ones_like(codes[0]))[1]
