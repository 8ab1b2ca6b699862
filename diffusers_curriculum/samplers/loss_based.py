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

    def _observed(self, losses: Tensor) -> Tensor:
        return losses.square()

    def _rule(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        return constants["weights"] * profile.sqrt()


@SAMPLERS.register(
    "loss_proportional",
    formula="p(l) ~ W E[loss]",
    source="arXiv 2303.00848",
    note="learns from observe()",
)
class LossProportionalTimestepSampler(AdaptiveTimestepSampler):
    """p(l) proportional to W E[loss], from running averages in bins of log-SNR (VDM++, arXiv
    2303.00848, section on its adaptive noise schedule).

    Where W is the objective's weight in the same measure, the importance corrected loss of every
    draw is then the same on average. The law of least gradient variance is another one:
    :class:`GradientNormTimestepSampler`.

    Args:
        measure: what W is a density against, as in :func:`weighting.loss_weights`: "log_snr" (the
            paper's; the mass of a timestep is W E[loss] times the width of its cell) or "draw" (W
            holds for each uniformly drawn timestep, as in diffusers' scripts).
        importance_correction: "full", as the paper's objective does not depend on the law.

    The other arguments, and errors, are those of :class:`AdaptiveTimestepSampler`; the paper's
    averages are running ones, the defaults of all numbers are this library's.
    """

    measure: str = checked(one_of, MEASURES, default="log_snr")

    def _rule_tables(self) -> dict[str, Tensor]:
        tables = super()._rule_tables()
        if self.measure == "log_snr":
            tables["weights"] = tables["weights"] * finite_widths(self.levels)
        return tables

    def _rule(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        return constants["weights"] * profile
