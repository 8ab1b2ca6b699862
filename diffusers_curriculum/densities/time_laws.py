"""Laws of the time fraction by name: B-TTDM, SpeeD, and those of diffusers' scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_curriculum.checks import checked, inside, one_of, whole
from diffusers_curriculum.densities.base import largest, positive, register
from diffusers_curriculum.densities.time_fraction import PiecewiseTime, TimeDensity

_LARGEST = 1000.0
_ROUNDS = 2000  # about 5 sqrt(max(a, b)) are needed
_TINY = 1e-300
MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # where the mode law's quantile function is monotone


@register(
    "beta",
    formula="p(tau) = tau^(alpha - 1) (1 - tau)^(beta - 1) / B(alpha, beta)",
    source="B-TTDM (ECCV 2024); OneTrainer",
    families="vp",
    note="Sources disagree on the paper's numbers, (alpha < 1, 1) or (0.5..2, 2..5): both favour "
    "clean levels. 0.8 and 1 are this library's default.",
)
@dataclass(frozen=True, eq=False)
class Beta(TimeDensity):
    """tau ~ Beta(alpha, beta), tau = 0 at the cleanest timestep (B-TTDM, ECCV 2024); ValueError for
    a parameter above 1000."""

    alpha: float = checked(inside, 0, _LARGEST, "(]", default=0.8)
    beta: float = checked(inside, 0, _LARGEST, "(]", default=1.0)

    def time_pdf(self, tau: Tensor) -> Tensor:
        log = torch.special.xlogy(self.alpha - 1, tau)
        log = log + torch.special.xlog1py(self.beta - 1, -tau)
        return torch.exp(log - log_beta(self.alpha, self.beta))

    def time_cdf(self, tau: Tensor) -> Tensor:
        return incomplete_beta(self.alpha, self.beta, tau)[0]

    def time_sf(self, tau: Tensor) -> Tensor:
        return incomplete_beta(self.alpha, self.beta, tau)[1]


@register(
    "speed",
    formula="k / (1 + tau (k - 1)) below the time fraction tau, 1 / (1 + tau (k - 1)) above",
    source="arXiv 2405.17403 (SpeeD): tau = 700 of 1000, k = 5",
    families="vp",
    note="tau below 1 is a fraction of the schedule, above 1 a number of timesteps. The paper's "
    "change-aware weight is a loss weighting of its own.",
)
@dataclass(frozen=True, eq=False)
class Speed(PiecewiseTime):
    """SpeeD's asymmetric law: the cleaner ``tau`` of the timesteps are k times as likely as the
    rest (arXiv 2405.17403: tau = 700 of 1000 and k = 5 in its ablations).

    ``tau`` below 1 is a fraction of the schedule, above 1 a number of its timesteps; where it ends
    inside a timestep, that one gets its part of both.

    Raises:
        ValueError: tau = 1 (everything), or as many timesteps as there are, or more.
    """

    tau: float = positive(0.7)
    k: float = positive(5.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.edges) - 1
        if self.tau == 1 or self.tau >= count:
            raise ValueError(
                f"tau={self.tau!r} must be a fraction below 1, or a number of timesteps above 1 "
                f"and below the schedule's {count}."
            )

    @property
    def _weights(self) -> list[tuple[float, float]]:
        end = self.tau if self.tau < 1 else self.tau / (len(self.edges) - 1)
        return [(end, self.k), (1.0, 1.0)]


@register(
    "timestep_bias",
    formula="w_i / sum(w): w = multiplier on the chosen timesteps, 1 on the others",
    source="diffusers' --timestep_bias_strategy (text_to_image SDXL)",
    families="vp",
    note="Timesteps count from the cleanest on every schedule, and range is [begin, end). The "
    "multiplier 2 is this library's default (the flag's, 1, is no bias).",
)
@dataclass(frozen=True, eq=False)
class TimestepBias(PiecewiseTime):
    """Some timesteps ``multiplier`` times as likely as the others (diffusers' SDXL script).

    Args:
        strategy: "earlier" (the cleanest ``portion``), "later" (the noisiest) or "range".
        multiplier: of the chosen timesteps, greater than 0; below 1 they are rarer.
        begin: first timestep of the range, default 0; timestep 0 is the cleanest.
        end: the timestep after its last, default the number of timesteps.
        portion: share of the timesteps, rounded down to a number of them; default 0.25.

    Raises:
        ValueError: no timestep is chosen, a range outside the schedule, or a setting of the other
            strategy.
    """

    strategy: str = checked(one_of, ("earlier", "later", "range"), default="later")
    multiplier: float = positive(2.0)
    begin: int | None = checked(whole, default=None)
    end: int | None = checked(whole, default=None)
    portion: float | None = checked(inside, 0, 1, "(]", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("portion",) if self.strategy == "range" else ("begin", "end"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with strategy="
                    f"{self.strategy!r}: leave it out."
                )
        begin, end = self.chosen
        count = len(self.edges) - 1
        if not begin < end <= count:
            raise ValueError(
                f"strategy={self.strategy!r} chooses none of the {count} timesteps, or some that "
                f"do not exist: [{begin}, {end}); use 0 <= begin < end <= {count}, or a portion of "
                f"{1 / count:g} or more."
            )

    @property
    def chosen(self) -> tuple[int, int]:
        """[first, last) of the timesteps that are biased, 0 = cleanest."""
        count = len(self.edges) - 1
        if self.strategy == "range":
            return self.begin or 0, count if self.end is None else self.end
        size = int((0.25 if self.portion is None else self.portion) * count)
        return (0, size) if self.strategy == "earlier" else (count - size, count)

    @property
    def _weights(self) -> list[tuple[float, float]]:
        count = len(self.edges) - 1
        begin, end = (index / count for index in self.chosen)
        pieces = [(begin, 1.0), (end, float(self.multiplier)), (1.0, 1.0)]
        starts = [0.0, begin, end]
        return [piece for start, piece in zip(starts, pieces, strict=True) if piece[0] > start]


@register(
    "scheme_logit_normal",
    formula="tau = sig(N(-mean, std^2))",
    source="diffusers' --weighting_scheme logit_normal (arXiv 2403.03206)",
    families="flow",
    note="Timesteps have the very probabilities that diffusers' flow-matching scripts give them: "
    "mean > 0 favours clean ones, contrary to logit_normal.",
)
@dataclass(frozen=True, eq=False)
class SchemeLogitNormal(TimeDensity):
    """A normal logit of tau; its numbers are those of ``--logit_mean`` and ``--logit_std``."""

    mean: float = 0.0
    std: float = positive(1.0)

    def time_pdf(self, tau: Tensor) -> Tensor:
        bell = torch.exp(-self._normal(tau).square() / 2) / math.sqrt(2 * math.pi)
        within = (tau > 0) & (tau < 1)
        return torch.where(within, bell / (self.std * tau * (1 - tau)), 0.0)

    def time_cdf(self, tau: Tensor) -> Tensor:
        return torch.special.ndtr(self._normal(tau))

    def time_sf(self, tau: Tensor) -> Tensor:
        return torch.special.ndtr(-self._normal(tau))

    def _normal(self, tau: Tensor) -> Tensor:
        return (torch.logit(tau) + self.mean) / self.std


@register(
    "scheme_mode",
    formula="tau = w + scale (cos^2(pi w / 2) - 1 + w), w uniform in (0, 1)",
    source="diffusers' --weighting_scheme mode (arXiv 2403.03206)",
    families="flow",
    note="Timesteps have the very probabilities that diffusers' flow-matching scripts give them.",
)
@dataclass(frozen=True, eq=False)
class SchemeMode(TimeDensity):
    """SD3's law with a mode in the middle; ``scale`` is that of ``--mode_scale``. Beyond [-1, 2 /
    (pi - 2)], where tau would leave [0, 1], a ValueError is raised."""

    scale: float = checked(inside, *MODE_SCALES, default=1.29)

    def time_pdf(self, tau: Tensor) -> Tensor:
        w = self.time_cdf(tau)
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * w)))

    def time_cdf(self, tau: Tensor) -> Tensor:
        low, high = torch.zeros_like(tau), torch.ones_like(tau)
        return largest(lambda w: self.time_icdf(w) <= tau, low, high)

    def time_icdf(self, probability: Tensor) -> Tensor:
        w = probability
        return w + self.scale * (torch.cos(math.pi * w / 2).square() - 1 + w)


# -- the regularised incomplete beta function, which torch does not have ---------------------------


def log_beta(a: float, b: float) -> float:
    """ln B(a, b)."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def incomplete_beta(a: float, b: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """(I_x(a, b), 1 - I_x(a, b)) for x in [0, 1], the part that is evaluated to its last digits.

    By the continued fraction DLMF 8.17.22, on the side of the mean where it converges fast.
    """
    swap = x > (a + 1) / (a + b + 2)
    first = torch.where(swap, b, torch.full_like(x, a))
    second = torch.where(swap, a, torch.full_like(x, b))
    y = torch.where(swap, 1 - x, x)
    power = torch.special.xlogy(first, y) + torch.special.xlog1py(second, -y)
    near = torch.exp(power - log_beta(a, b)) / (first * _continued_fraction(first, second, y))
    near = near.clamp(0, 1)
    return torch.where(swap, 1 - near, near), torch.where(swap, near, 1 - near)


def _continued_fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """1 + d1 / (1 + d2 / (1 + ...)), by Lentz's algorithm."""
    value, numerator = torch.ones_like(x), torch.ones_like(x)
    denominator = torch.full_like(x, torch.inf)
    for n in range(1, _ROUNDS):
        m = n // 2
        even = m * (b - m) * x / ((a + n - 1) * (a + n))
        odd = -(a + m) * (a + b + m) * x / ((a + n - 1) * (a + n))
        step = odd if n % 2 else even
        numerator = _nonzero(1 + step / numerator)
        denominator = _nonzero(1 + step / denominator)
        change = numerator / denominator
        value = value * change
        if bool(((change - 1).abs() < 4e-16).all()):
            break
    return value


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < _TINY, _TINY, x)
