"""Laws as their papers state them: of a flow's noise fraction t, or of EDM's sigma.

t is 0 at clean images, so that l = 2 ln((1 - t) / t); sigma is that of alpha = 1, l = -2 ln sigma.
A shift s of flow matching makes t s t / (1 + (s - 1) t), in log-SNR l - 2 ln s, for every law and
every family of schedules; by default it is that of the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.checks import above_zero, checked, inside
from diffusers_curriculum.densities.base import (
    Placement,
    SymmetricDensity,
    largest,
    positive,
    register,
)
from diffusers_curriculum.densities.laws import Cosine, LogisticShape, NormalShape

# Two points of (image tokens, mu), mu = ln s; a line through them is not clamped.
Line = tuple[tuple[float, float], tuple[float, float]]
FLUX_LINE: Line = (256, 0.5), (4096, 1.15)
_SHIFTS = ("shift", "tokens", "pixels")  # what may say the shift
_SD3 = "arXiv 2403.03206, section 3.1"
_MODE_LIMIT = 2 / (math.pi - 2)
_MODE_FORMULA = "t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), u uniform; l = 2 ln((1 - t) / t)"
_MODE_LIMITS = f"-1 <= scale <= 2 / (pi - 2) = {_MODE_LIMIT:.4f}, where the map is monotone."


def shift_from_pixels(pixels: float, base_pixels: float) -> float:
    """s = sqrt(pixels / base_pixels), the resolution rule of arXiv 2403.03206 (numbers of pixels,
    1024 * 1024, not lengths); ValueError for a number that is not positive."""
    above_zero("pixels", pixels)
    above_zero("base_pixels", base_pixels)
    return math.sqrt(pixels / base_pixels)


def shift_from_tokens(tokens: float, line: Line = FLUX_LINE) -> float:
    """s = e^mu, mu linear in the number of image tokens: 0.5 at 256, 1.15 at 4096 (FLUX; diffusers'
    ``calculate_shift``) or another ``line`` through two points (tokens, mu), not clamped;
    ValueError for a number that is not positive, or so large that ln s is none of [-100, 100]."""
    above_zero("tokens", tokens)
    return math.exp(_log_shift(tokens, line))


def _log_shift(tokens: float, line: Line = FLUX_LINE) -> float:
    (first, low), (last, high) = line
    mu = low + (tokens - first) * (high - low) / (last - first)
    inside(f"mu at tokens={tokens!r}", mu, -100, 100)
    return mu


@dataclass(frozen=True, kw_only=True)
class Shifted(SymmetricDensity):
    """A law of the unshifted noise fraction, moved to l - 2 ln s.

    At most one of ``shift``, ``tokens`` and ``pixels`` with ``base_pixels`` says what s is. Without
    them a sampler takes the shift of its schedule, if it has one: the law is one of the model's own
    clock, and moves with it as the draws of diffusers' training scripts do.

    Raises:
        ValueError: more than one of them, or pixels without base_pixels.
    """

    shift: float | None = checked(above_zero, default=None)
    tokens: float | None = checked(above_zero, default=None)
    pixels: float | None = checked(above_zero, default=None)
    base_pixels: float | None = checked(above_zero, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"{name}={getattr(self, name)!r}" for name in _SHIFTS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say what the shift is: give one of them.")
        if (self.pixels is None) != (self.base_pixels is None):
            raise ValueError(
                f"pixels={self.pixels!r} and base_pixels={self.base_pixels!r} go together: the "
                "shift is sqrt(pixels / base_pixels)."
            )

    @classmethod
    def on_clock(cls, parameters: dict[str, Any], shift: float) -> dict[str, Any]:
        told = any(parameters.get(name) is not None for name in (*_SHIFTS, "base_pixels"))
        return parameters if told else parameters | {"shift": shift}

    @property
    def log_shift(self) -> float:
        """ln s."""
        if self.tokens is not None:
            return _log_shift(self.tokens)
        if self.pixels is not None and self.base_pixels is not None:
            return math.log(shift_from_pixels(self.pixels, self.base_pixels))
        return math.log(self.shift) if self.shift is not None else 0.0

    _centre = property(lambda self: -2 * self.log_shift)


@register(
    "logit_normal",
    formula="N(-2 mean - 2 ln shift, (2 std)^2), that is t = sig(N(mean, std^2))",
    source=_SD3,
    families="flow",
    note="mean > 0 favours noise, as in the paper. diffusers' function for SD3's training counts "
    "from the noisy end: its logit_mean has the opposite sign. The shift is that of the schedule, "
    "unless one is given.",
)
@dataclass(frozen=True)
class LogitNormal(Shifted, NormalShape):
    """A normal logit of the noise fraction t (shift, tokens and pixels: see :class:`Shifted`).

    diffusers uses sig(N(logit_mean, logit_std^2)) as a position in its descending timesteps, where
    0 is noise: mean = -logit_mean.
    """

    placement = Placement("mean", "std", -2.0, {"shift": 1.0})
    mean: float = 0.0
    std: float = positive(1.0)
    _centre = property(lambda self: -2 * self.mean - 2 * self.log_shift)
    _std = property(lambda self: 2 * self.std)


@register(
    "flow_uniform",
    formula="F(l) = sig((l + 2 ln shift) / 2), that is t uniform in (0, 1)",
    source="arXiv 2209.03003; shifted: arXiv 2403.03206",
    families="flow",
)
@dataclass(frozen=True)
class FlowUniform(Shifted, LogisticShape):
    """t uniform in (0, 1) (shift, tokens and pixels: see :class:`Shifted`)."""

    _scale = 2.0


@register(
    "cosmap",
    formula="sech((l + 2 ln shift) / 2) / (2 pi), that is p(t) = 2 / (pi (1 - 2 t + 2 t^2))",
    source=_SD3,
    families="flow",
    note="The same law as cosine. diffusers' weighting_scheme=cosmap is a loss weight, not this.",
)
@dataclass(frozen=True)
class CosMap(Shifted, Cosine):
    """In log-SNR the cosine law, shifted (shift, tokens and pixels: see :class:`Shifted`)."""


@register(
    "mode",
    formula=_MODE_FORMULA,
    source=f"{_SD3}, 'mode sampling with heavy tails'",
    families="flow",
    note=f"{_MODE_LIMITS} 1.29 is diffusers' default.",
)
@dataclass(frozen=True)
class Mode(Shifted):
    """A cosine map t(u) of uniform u: F(l) is the u that maps to t(l), p(l) = t (1 - t) / (2
    |dt/du|). Strictly positive at both ends for scale > -1 (shift, tokens and pixels: see
    :class:`Shifted`).

    Raises:
        ValueError: scale is outside [-1, 2 / (pi - 2)], where the map is not monotone.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.scale <= _MODE_LIMIT:
            raise ValueError(f"scale={self.scale!r} is out of range: use {_MODE_LIMITS}")

    def _pdf(self, z: Tensor) -> Tensor:
        clean = torch.sigmoid(-z.abs() / 2)
        u = self._lower_cdf(-z.abs())
        slope = 1 + self.scale - self.scale * (math.pi / 2) * torch.sin(math.pi * u)
        density = clean * (1 - clean) / (2 * slope.clamp_min(0))
        return torch.where(clean == 0, 0.0, density)

    def _lower_cdf(self, z: Tensor) -> Tensor:
        clean = torch.sigmoid(z / 2)
        zero, half = torch.zeros_like(z), torch.full_like(z, 0.5)
        u = largest(lambda u: self._clean_fraction(u) <= clean, zero, half)
        return torch.where(clean == 0, 0.0, u)

    def _lower_icdf(self, p: Tensor) -> Tensor:
        clean = self._clean_fraction(p)
        return 2 * (torch.log(clean) - torch.log1p(-clean))

    def _clean_fraction(self, u: Tensor) -> Tensor:
        """1 - t, without the cancellation of the published form near u = 0."""
        return (1 + self.scale) * u - self.scale * torch.sin(math.pi * u / 2).square()


@register(
    "heavy_tail",
    formula=_MODE_FORMULA,
    source=f"OneTrainer's name for mode; {_SD3}",
    families="flow",
    note="The same law as mode; OneTrainer's noising weight is the scale.",
)
@dataclass(frozen=True)
class HeavyTail(Mode):
    """The law :class:`Mode`, under the name that OneTrainer gives it."""


@register(
    "edm",
    formula="N(-2 p_mean, (2 p_std)^2), that is ln sigma ~ N(p_mean, p_std^2)",
    source="arXiv 2206.00364, table 1",
    families="edm",
    note="Meant for data of standard deviation 0.5; for data of unit scale the same noise lies "
    "2 ln 2 lower in log-SNR: p_mean = -1.2 + ln 2 = -0.507.",
)
@dataclass(frozen=True)
class Edm(NormalShape):
    """A normal logarithm of sigma."""

    placement = Placement("p_mean", "p_std", -2.0)
    p_mean: float = -1.2
    p_std: float = positive(1.2)
    _centre = property(lambda self: -2 * self.p_mean)
    _std = property(lambda self: 2 * self.p_std)


@register(
    "edm2",
    formula="N(-2 p_mean, (2 p_std)^2), that is ln sigma ~ N(p_mean, p_std^2)",
    source="arXiv 2312.02696: (-0.4, 1.0) for 512-pixel latents, (-0.8, 1.6) for 64 pixels",
    families="edm",
    note="Meant for latents of standard deviation 0.5.",
)
@dataclass(frozen=True)
class Edm2(Edm):
    """The law of :class:`Edm` with the numbers for 512-pixel latents."""

    p_mean: float = -0.4
    p_std: float = positive(1.0)


@register(
    "u_shaped",
    formula="p(t) = a (e^(a t) + e^(a (1 - t))) / (2 (e^a - 1)), l = 2 ln((1 - t) / t)",
    source="arXiv 2405.20320 (RF++), a = 4",
    families="flow",
    note="Made for reflow, on pairs of noise and image, not for plain training.",
)
@dataclass(frozen=True)
class UShaped(SymmetricDensity):
    """Most mass at both ends of t; the paper's code keeps t within [1e-5, 1 - 1e-5], this law does
    not.

    Raises:
        ValueError: a above 500, where the exponentials overflow.
    """

    a: float = checked(inside, 0, 500, "(]", default=4.0)

    def _pdf(self, z: Tensor) -> Tensor:
        clean = torch.sigmoid(-z.abs() / 2)
        density = self.a * torch.cosh(self.a * (0.5 - clean)) / (2 * math.sinh(self.a / 2))
        return density * clean * (1 - clean) / 2

    def _lower_cdf(self, z: Tensor) -> Tensor:
        # (sinh(a/2) - sinh(a/2 - a r)) / (2 sinh(a/2)), as a product: the tail keeps its digits
        part = self.a * torch.sigmoid(z / 2) / 2
        return torch.cosh(self.a / 2 - part) * torch.sinh(part) / math.sinh(self.a / 2)

    def _lower_icdf(self, p: Tensor) -> Tensor:
        # asinh(sinh(a/2)) - asinh((1 - 2 p) sinh(a/2)), as one asinh, for the same reason
        s, c = math.sinh(self.a / 2), math.cosh(self.a / 2)
        y = (1 - 2 * p) * s
        root = torch.hypot(torch.ones_like(y), y)
        clean = torch.asinh(4 * p * (1 - p) * s * s / (s * root + y * c)) / self.a
        return 2 * (torch.log(clean) - torch.log1p(-clean))
