"""Laws as their papers state them: of a flow's noise fraction t, or of EDM's sigma.

t is 0 at clean images, so that l = 2 ln((1 - t) / t); sigma is that of alpha = 1, l = -2 ln sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_curriculum.checks import checked, inside
from diffusers_curriculum.densities.base import SymmetricDensity, largest, positive, register
from diffusers_curriculum.densities.laws import HyperbolicSecant, LogisticShape, NormalShape
from diffusers_curriculum.densities.shift import Shifted

_SD3 = "arXiv 2403.03206, section 3.1"
_MODE_LIMIT = 2 / (math.pi - 2)
_MODE_FORMULA = "t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), u uniform; l = 2 ln((1 - t) / t)"
_MODE_LIMITS = f"-1 <= scale <= 2 / (pi - 2) = {_MODE_LIMIT:.4f}, where the map is monotone."


@register(
    "logit_normal",
    formula="N(-2 mean - 2 ln shift, (2 std)^2), that is t = sig(N(mean, std^2))",
    source=_SD3,
    families="flow",
    note="mean > 0 favours noise, as in the paper. diffusers' function for SD3's training counts "
    "from the noisy end: its logit_mean has the opposite sign.",
)
@dataclass(frozen=True)
class LogitNormal(Shifted, NormalShape):
    """t = sig(N(mean, std^2)), t the noise fraction: l ~ N(-2 mean - 2 ln s, (2 std)^2) (arXiv
    2403.03206; shift, tokens and pixels: see :class:`Shifted`).

    diffusers uses sig(N(logit_mean, logit_std^2)) as a position in its descending timesteps, where
    0 is noise: mean = -logit_mean.
    """

    mean: float = 0.0
    std: float = positive(1.0)

    @property
    def _centre(self) -> float:
        return -2 * self.mean - 2 * self.log_shift

    @property
    def _std(self) -> float:
        return 2 * self.std


@register(
    "flow_uniform",
    formula="F(l) = sig((l + 2 ln shift) / 2), that is t uniform in (0, 1)",
    source="arXiv 2209.03003; shifted: arXiv 2403.03206",
    families="flow",
)
@dataclass(frozen=True)
class FlowUniform(Shifted, LogisticShape):
    """t uniform in (0, 1): F(l) = sig((l + 2 ln s) / 2), density sech^2(l / 4) / 8 for s = 1
    (shift, tokens and pixels: see :class:`Shifted`)."""

    @property
    def _scale(self) -> float:
        return 2.0


@register(
    "cosmap",
    formula="sech((l + 2 ln shift) / 2) / (2 pi), that is p(t) = 2 / (pi (1 - 2 t + 2 t^2))",
    source=_SD3,
    families="flow",
    note="The same law as cosine. diffusers' weighting_scheme=cosmap is a loss weight, not this.",
)
@dataclass(frozen=True)
class CosMap(Shifted, HyperbolicSecant):
    """p(t) = 2 / (pi (1 - 2 t + 2 t^2)) (arXiv 2403.03206): in log-SNR the cosine law, moved by
    -2 ln s (shift, tokens and pixels: see :class:`Shifted`)."""


@register(
    "mode",
    formula=_MODE_FORMULA,
    source=f"{_SD3}, 'mode sampling with heavy tails'",
    families="flow",
    note=f"{_MODE_LIMITS} 1.29 is diffusers' default.",
)
@dataclass(frozen=True)
class Mode(Shifted):
    """t = 1 - u - k (cos^2(pi u / 2) - 1 + u) with u uniform and k = ``scale`` (arXiv 2403.03206):
    F(l) is the u that maps to t(l); p(l) = t (1 - t) / (2 |dt/du|). Strictly positive at both ends
    for k > -1 (shift, tokens and pixels: see :class:`Shifted`).

    Raises:
        ValueError: k is outside [-1, 2 / (pi - 2)], where the map is not monotone.
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
    """The law :class:`Mode`, under the name that OneTrainer gives it ("mode sampling with heavy
    tails" is the paper's heading)."""


@register(
    "edm",
    formula="N(-2 p_mean, (2 p_std)^2), that is ln sigma ~ N(p_mean, p_std^2)",
    source="arXiv 2206.00364, table 1",
    families="edm",
    note="Meant for data of standard deviation 0.5; for unit data the same noise is -2 ln 2 lower "
    "in log-SNR.",
)
@dataclass(frozen=True)
class Edm(NormalShape):
    """ln sigma ~ N(p_mean, p_std^2): l ~ N(-2 p_mean, (2 p_std)^2) (arXiv 2206.00364, table 1)."""

    p_mean: float = -1.2
    p_std: float = positive(1.2)

    @property
    def _centre(self) -> float:
        return -2 * self.p_mean

    @property
    def _std(self) -> float:
        return 2 * self.p_std


@register(
    "edm2",
    formula="N(-2 p_mean, (2 p_std)^2), that is ln sigma ~ N(p_mean, p_std^2)",
    source="arXiv 2312.02696: (-0.4, 1.0) for 512-pixel latents, (-0.8, 1.6) for 64 pixels",
    families="edm",
    note="Meant for latents of standard deviation 0.5.",
)
@dataclass(frozen=True)
class Edm2(Edm):
    """The law of :class:`Edm` with the numbers of arXiv 2312.02696 for 512-pixel latents."""

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
    """p(t) = a (e^(a t) + e^(a (1 - t))) / (2 (e^a - 1)), t the noise fraction (arXiv 2405.20320;
    its code keeps t within [1e-5, 1 - 1e-5], this law does not).

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
