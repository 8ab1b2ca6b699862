"""What the network is trained to predict, and its loss: one short function for each target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_curriculum.checks import one_of
from diffusers_curriculum.noise_levels import NoiseLevels

_TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, alpha, sigma: noise,
    "sample": lambda x0, noise, alpha, sigma: x0,
    "v_prediction": lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
    "flow": lambda x0, noise, alpha, sigma: noise - x0,
}
_DENOISED: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda p, x, alpha, sigma: (x - sigma * p) / alpha,
    "sample": lambda p, x, alpha, sigma: p,
    "v_prediction": lambda p, x, alpha, sigma: alpha * x - sigma * p,
    "flow": lambda p, x, alpha, sigma: x - sigma * p,
}
PREDICTION_TYPES = (*_TARGETS, "edm")
_FAMILY = {"v_prediction": "vp", "flow": "flow", "edm": "edm"}
_SIGNS = {"edm": 1.0, "v_prediction": -1.0}  # of F, as schedulers with sigma_data have them


@dataclass(frozen=True)
class Objective:
    """Corruption, target and loss of one prediction type on one table of noise levels.

    ``at`` says the noise level of each sample: (B,) int64 indices into the levels or, for flow
    matching and EDM, (B,) floating log-SNRs; (B, N) where each of N tokens has its own.

    Given the same data, noise and levels, values and gradients are those of diffusers' training
    scripts bit for bit (float32).

    Args:
        levels: the noise levels; their prediction type is the objective's.

    Raises:
        ValueError: unknown prediction type, or one that the family of the schedule does not have.
    """

    levels: NoiseLevels

    def __post_init__(self) -> None:
        kind = self.prediction_type
        one_of("prediction_type", kind, PREDICTION_TYPES)
        if not self._has(kind):
            fitting = [name for name in PREDICTION_TYPES if self._has(name)]
            raise ValueError(
                f"prediction_type={kind!r} is defined for the {_FAMILY[kind]!r} family, and this "
                f"schedule is {self.levels.family!r} with sigma_data={self.levels.sigma_data}: "
                f"choose from {', '.join(fitting)}, or another scheduler."
            )

    @property
    def prediction_type(self) -> str:
        return self.levels.prediction_type

    def add_noise(self, sample: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """x = alpha x0 + sigma noise; sample and noise (B, ...)."""
        alpha, sigma = self._coefficients(sample, at)
        if self.levels.family == "flow":  # diffusers' order of terms, for equal rounding
            return sigma * noise + alpha * sample
        return alpha * sample + sigma * noise

    def slowed(self, at: Tensor, share: Tensor) -> Tensor:
        """Log-SNRs (B,) of levels ``share`` (B,) of the way from ``at`` to pure noise: noise
        fractions t + share (1 - t), the input of MixFlow (arXiv 2512.19311).

        Raises:
            ValueError: this schedule is not one of flow matching.
        """
        if self.levels.family != "flow":
            raise ValueError(
                f"slower levels are those of flow matching, and this schedule is "
                f"{self.levels.family!r}: leave them out."
            )
        alpha, sigma = self.levels.to(at.device).coefficients(at)
        return 2 * (torch.log(alpha * (1 - share)) - torch.log(sigma + share * alpha))

    def scale_input(self, noisy: Tensor, at: Tensor) -> Tensor:
        """What the network is given: c_in x, c_in = 1 / sqrt(sigma^2 + sigma_data^2), under EDM's
        preconditioning (arXiv 2206.00364, table 1), else x itself."""
        if self._sign is None:
            return noisy
        sigma, data = self._preconditioning(noisy, at)
        return self._like(noisy, 1 / torch.hypot(sigma, data)) * noisy

    def target(self, sample: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """What the network should predict: noise (epsilon), x0 (sample), alpha noise - sigma x0
        (v_prediction, arXiv 2202.00512), noise - x0 (flow) or F = (x0 - c_skip x) / c_out (edm,
        arXiv 2206.00364, eq. 8); same shape as ``sample``."""
        if self._sign is None:
            coefficients = self._coefficients(sample, at)
            return _TARGETS[self.prediction_type](sample, noise, *coefficients)
        # the same F without the difference of nearly equal numbers at small sigma
        sigma, data = self._preconditioning(sample, at)
        total = self._sign * torch.hypot(sigma, data)
        clean, dirty = self._like(sample, sigma / (data * total)), self._like(sample, data / total)
        return clean * sample - dirty * noise

    def denoised(self, prediction: Tensor, noisy: Tensor, at: Tensor) -> Tensor:
        """The estimate of x0 that a prediction amounts to, given x before :meth:`scale_input`; of
        epsilon it is infinite where alpha is 0. Same shape as ``noisy``."""
        if self._sign is None:
            coefficients = self._coefficients(noisy, at)
            return _DENOISED[self.prediction_type](prediction, noisy, *coefficients)
        sigma, data = self._preconditioning(noisy, at)
        total = torch.hypot(sigma, data)
        skip, out = (data / total).square(), self._sign * sigma * data / total
        return self._like(noisy, skip) * noisy + self._like(noisy, out) * prediction

    def loss(
        self,
        prediction: Tensor,
        target: Tensor,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        per_token: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The loss to differentiate and the unweighted loss of each sample, or of each token.

        Args:
            prediction: (B, ...), any float dtype; errors are squared in float32.
            weights: (B,) factors of the samples' losses, or None; (B, N) of tokens.
            mask: factors of the squared errors in both losses, of a shape that broadcasts to
                theirs, with mean 1 in each sample; or None.
            per_token: the second dimension is of tokens, with levels and losses of their own.

        Returns:
            0-dim mean over the batch of weights * mean squared error, and (B,) or (B, N) float32,
            detached.
        """
        squares = F.mse_loss(prediction.float(), target.float(), reduction="none")
        squares = squares if mask is None else mask * squares
        if per_token:
            per_sample = squares.reshape(*squares.shape[:2], -1).mean(-1)
        else:
            per_sample = squares.mean(dim=list(range(1, squares.ndim)))
        if weights is None and mask is None:
            loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
        else:
            loss = (per_sample if weights is None else per_sample * weights).mean()
        return loss, per_sample.detach()

    def _has(self, kind: str) -> bool:
        """Whether this schedule has the prediction type ``kind``."""
        if self.levels.sigma_data is not None and kind in _SIGNS:
            return True
        return kind != "edm" and _FAMILY.get(kind, self.levels.family) == self.levels.family

    @property
    def _sign(self) -> float | None:
        """1 for F, -1 for -F, None without EDM's preconditioning."""
        return None if self.levels.sigma_data is None else _SIGNS.get(self.prediction_type)

    def _preconditioning(self, sample: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """sigma (B,) and sigma_data, both in the precision of the table."""
        sigma = self.levels.to(sample.device).coefficients(at)[1]
        return sigma, torch.full_like(sigma, self.levels.sigma_data or 0.0)

    def _coefficients(self, sample: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.levels.to(sample.device).coefficients(at)
        if self.levels.family == "vp":
            # The squares narrow to diffusers' own float32 table. Its root must be taken in the same
            # arithmetic: on some CPUs torch's float32 sqrt is not the correctly rounded one.
            dtype = torch.promote_types(sample.dtype, torch.float32)
            alpha, sigma = alpha.square().to(dtype).sqrt(), sigma.square().to(dtype).sqrt()
        return self._like(sample, alpha), self._like(sample, sigma)

    @staticmethod
    def _like(sample: Tensor, factor: Tensor) -> Tensor:
        """(B,) or (B, N) factors as (B, 1, ...) or (B, N, 1, ...) in the dtype of ``sample``."""
        return factor.to(sample.dtype).view(factor.shape + (1,) * (sample.ndim - factor.ndim))
