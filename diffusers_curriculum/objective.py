"""What the network is trained to predict, and its loss: one short function for each target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels

_TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, alpha, sigma: noise,
    "sample": lambda x0, noise, alpha, sigma: x0,
    "v_prediction": lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
    "flow": lambda x0, noise, alpha, sigma: noise - x0,
}
_FAMILY = {"v_prediction": "vp", "flow": "flow"}


@dataclass(frozen=True)
class Objective:
    """Corruption, target and loss of one prediction type on one table of noise levels.

    Given the same data, noise and levels, values and gradients are those of diffusers' training
    scripts bit for bit (float32).

    Args:
        levels: the noise levels; their prediction type is the objective's.

    Raises:
        ValueError: unknown prediction type, or one that the family of the schedule does not have.
    """

    levels: NoiseLevels

    def __post_init__(self) -> None:
        kind, family = self.prediction_type, self.levels.family
        if kind not in _TARGETS:
            raise ValueError(
                f"prediction_type={kind!r} is unknown: choose from {', '.join(_TARGETS)}."
            )
        if _FAMILY.get(kind, family) != family:
            fitting = [name for name in _TARGETS if _FAMILY.get(name, family) == family]
            raise ValueError(
                f"prediction_type={kind!r} is defined for the {_FAMILY[kind]!r} family, and this "
                f"schedule is {family!r}: choose from {', '.join(fitting)}, or another scheduler."
            )

    @property
    def prediction_type(self) -> str:
        return self.levels.prediction_type

    def add_noise(self, sample: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """x = alpha x0 + sigma noise at the levels ``indices`` (B,); sample and noise (B, ...)."""
        alpha, sigma = self._coefficients(sample, indices)
        if self.levels.family == "flow":  # diffusers' order of terms, for equal rounding
            return sigma * noise + alpha * sample
        return alpha * sample + sigma * noise

    def target(self, sample: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """What the network should predict: noise (epsilon), x0 (sample), alpha noise - sigma x0
        (v_prediction, arXiv 2202.00512) or noise - x0 (flow); same shape as ``sample``."""
        return _TARGETS[self.prediction_type](sample, noise, *self._coefficients(sample, indices))

    def loss(
        self, prediction: Tensor, target: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss to differentiate and the unweighted loss of each sample.

        Args:
            prediction: (B, ...), any float dtype; errors are squared in float32.
            weights: (B,) factors of the samples' losses, or None.

        Returns:
            0-dim mean over the batch of weights * mean squared error, and (B,) float32, detached.
        """
        squares = F.mse_loss(prediction.float(), target.float(), reduction="none")
        per_sample = squares.mean(dim=list(range(1, squares.ndim)))
        if weights is None:
            loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
        else:
            loss = (per_sample * weights).mean()
        return loss, per_sample.detach()

    def _coefficients(self, sample: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.levels.to(sample.device)
        shape = (-1,) + (1,) * (sample.ndim - 1)
        pair = levels.alpha[indices], levels.sigma[indices]
        if levels.family == "vp":
            # The squares narrow to diffusers' own float32 table. Its root must be taken in the same
            # arithmetic: on some CPUs torch's float32 sqrt is not the correctly rounded one.
            dtype = torch.promote_types(sample.dtype, torch.float32)
            pair = pair[0].square().to(dtype).sqrt(), pair[1].square().to(dtype).sqrt()
        return pair[0].to(sample.dtype).view(shape), pair[1].to(sample.dtype).view(shape)
