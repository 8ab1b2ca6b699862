"""Laws that follow the size of the loss at each noise level."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffusers_curriculum.checks import checked, inside, one_of, whole
from diffusers_curriculum.samplers.adaptive import AdaptiveTimestepSampler
from diffusers_curriculum.samplers.base import SAMPLERS
from diffusers_curriculum.samplers.statistics import LastValues, Statistics, finite_widths
from diffusers_curriculum.weighting import MEASURES


@SAMPLERS.register(
    "loss_second_moment",
    formula="p(t) ~ W sqrt(E[loss^2])",
    source="arXiv 2102.09672, openai/guided-diffusion",
    note="learns from observe(); published rule with as many bins as timesteps",
)
class LossSecondMomentTimestepSampler(AdaptiveTimestepSampler):
    """p proportional to W sqrt(E[loss^2]) per timestep: the law of least variance for an estimate
    of the loss (arXiv 2102.09672).

    With as many bins as levels it is the published rule: the last ``min_observations`` (10) losses
    of each timestep, a law from every step's losses, and 0.001 of the uniform law mixed in. That
    rule has neither averages over time nor over neighbours. With fewer bins, which need fewer
    observations, ``refresh_every`` is 100 and ``floor`` 0.1 (this library's defaults, as are those
    of the other numbers).

    Args:
        importance_correction: "full", as published: the objective is that of uniform draws.

    The other arguments, and errors, are those of :class:`AdaptiveTimestepSampler`.
    """

    refresh_every: int = checked(whole, 1, default=None)
    warm_up = 0
    floor: float = checked(inside, 0, 1, default=None)

    def _resolve_defaults(self, levels: int) -> None:
        super()._resolve_defaults(levels)
        published = self.bins == levels
        if self.refresh_every is None:
            self.refresh_every = 1 if published else 100
        if self.floor is None:
            self.floor = 1e-3 if published else 0.1

    def _build_statistics(self) -> Statistics:
        levels = len(self.levels)
        if self.bins < levels:
            return super()._build_statistics()
        return LastValues(tuple(range(levels)), self.min_observations)

    def _scale(self) -> Tensor:
        return self._weights()

    def _observed(self, losses: Tensor) -> Tensor:
        return losses.square()

    def _rule(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        return profile.sqrt()


@SAMPLERS.register(
    "loss_proportional",
    formula="p(t) ~ W E[loss]",
    source="arXiv 2303.00848",
    note="learns from observe(); the paper's is per unit of log-SNR: measure='log_snr'",
)
class LossProportionalTimestepSampler(AdaptiveTimestepSampler):
    """Mass of a timestep proportional to W E[loss], from running averages in bins of log-SNR
    (VDM++, arXiv 2303.00848, section on its adaptive noise schedule).

    Where W is the weight that the loss is trained with, the importance corrected loss of every draw
    is then the same on average, but for the floor. The law of least gradient variance is another
    one: :class:`GradientNormTimestepSampler`.

    Args:
        measure: what W is a density against, as in :func:`weighting.loss_weights`: "draw" (W holds
            for each uniformly drawn timestep, as losses are weighted in diffusers' scripts) or
            "log_snr" (the paper's: the mass of a timestep is W E[loss] times the width of its
            cell, for losses that are weighted by that width too).
        importance_correction: "full", as the paper's objective does not depend on the law.

    The other arguments, and errors, are those of :class:`AdaptiveTimestepSampler`; the paper's
    averages are running ones, the defaults of all numbers are this library's.
    """

    measure: str = checked(one_of, MEASURES, default="draw")

    def _scale(self) -> Tensor:
        per_draw = self._weights()
        return per_draw * finite_widths(self.levels) if self.measure == "log_snr" else per_draw

    def _rule(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        return profile
