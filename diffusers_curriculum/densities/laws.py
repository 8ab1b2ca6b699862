"""Laws of log-SNR in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.densities.base import (
    Density,
    Placement,
    SymmetricDensity,
    positive,
    register,
)

_IMPORTANCE = "arXiv 2407.03297"


# -- shapes of symmetric laws; each law calls its width what its source calls it -------------------


class NormalShape(SymmetricDensity):
    """p(mu + z) = exp(-(z / std)^2 / 2) / (std sqrt(2 pi))."""

    _std: Any

    def _pdf(self, z: Tensor) -> Tensor:
        return torch.exp(-0.5 * (z / self._std).square()) / (self._std * math.sqrt(2 * math.pi))

    def _lower_cdf(self, z: Tensor) -> Tensor:
        return torch.erfc(-z / (self._std * math.sqrt(2))) / 2  # ndtr is 0 below -8

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return self._std * torch.special.ndtri(p)


class LogisticShape(SymmetricDensity):
    """F(mu + z) = sig(z / s)."""

    _scale: Any

    def _pdf(self, z: Tensor) -> Tensor:
        decay = torch.exp(-z.abs() / self._scale)
        return decay / (self._scale * (1 + decay).square())

    def _lower_cdf(self, z: Tensor) -> Tensor:
        decay = torch.exp(z / self._scale)
        return decay / (1 + decay)

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return self._scale * (torch.log(p) - torch.log1p(-p))


# -- laws ------------------------------------------------------------------------------------------


@register(
    "laplace",
    formula="exp(-|l - mu| / b) / (2 b)",
    source=f"{_IMPORTANCE}: mu = 0, b = 0.5 at 256 pixels, 0.75 at 512",
    note="Narrow: keep a floor, or the ends of the schedule are hardly ever trained.",
)
@dataclass(frozen=True)
class Laplace(SymmetricDensity):
    """Laplace's law, two exponentials back to back."""

    placement = Placement("mu", "b")
    mu: float = 0.0
    b: float = positive(0.5)

    def _pdf(self, z: Tensor) -> Tensor:
        return torch.exp(-z.abs() / self.b) / (2 * self.b)

    def _lower_cdf(self, z: Tensor) -> Tensor:
        return torch.exp(z / self.b) / 2

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return self.b * torch.log(2 * p)


@register(
    "cauchy",
    formula="gamma / (pi ((l - mu)^2 + gamma^2))",
    source=f"{_IMPORTANCE} names the law",
    note="gamma = 1 is this library's default.",
)
@dataclass(frozen=True)
class Cauchy(SymmetricDensity):
    """Cauchy's law, with tails that fall as the square."""

    placement = Placement("mu", "gamma")
    mu: float = 0.0
    gamma: float = positive(1.0)

    def _pdf(self, z: Tensor) -> Tensor:
        return self.gamma / (math.pi * (z.square() + self.gamma**2))

    def _lower_cdf(self, z: Tensor) -> Tensor:
        return torch.atan2(torch.full_like(z, self.gamma), -z) / math.pi

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return -self.gamma / torch.tan(math.pi * p)


@register("cosine", formula="sech(l / 2) / (2 pi)", source=f"arXiv 2102.09672; {_IMPORTANCE}")
@dataclass(frozen=True)
class Cosine(SymmetricDensity):
    """The law of the cosine schedule alpha = cos(pi t / 2) under uniform t; with mu and s of a
    subclass, s sech(s (l - mu) / 2) / (2 pi)."""

    @property
    def _sharpness(self) -> float:
        return getattr(self, "s", 1.0)

    def _pdf(self, z: Tensor) -> Tensor:
        decay = torch.exp(-self._sharpness * z.abs() / 2)  # sech without the overflow of cosh
        return self._sharpness * decay / (math.pi * (1 + decay.square()))

    def _lower_cdf(self, z: Tensor) -> Tensor:
        return (2 / math.pi) * torch.atan(torch.exp(self._sharpness * z / 2))

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return (2 / self._sharpness) * torch.log(torch.tan(math.pi * p / 2))


@register(
    "cosine_shifted",
    formula="sech((l - mu) / 2) / (2 pi)",
    source="arXiv 2301.11093: mu = 2 ln(64 / resolution)",
    note="mu = 0, no shift, is this library's default.",
    example={"mu": -2.0},
)
@dataclass(frozen=True)
class CosineShifted(Cosine):
    """The cosine law moved to mu."""

    placement = Placement("mu")
    mu: float = 0.0


@register(
    "cosine_scaled",
    formula="s sech(s l / 2) / (2 pi)",
    source=f"{_IMPORTANCE} names the law",
    note="s = 2 is this library's default.",
)
@dataclass(frozen=True)
class CosineScaled(Cosine):
    """The cosine law with its axis divided by s."""

    s: float = positive(2.0)


@register(
    "normal",
    formula="exp(-((l - mean) / std)^2 / 2) / (std sqrt(2 pi))",
    source="the law behind edm, edm2 and logit_normal",
    note="mean = 0, std = 2 is logit_normal(0, 1).",
)
@dataclass(frozen=True)
class Normal(NormalShape):
    """Normal law of log-SNR."""

    placement = Placement("mean", "std")
    mean: float = 0.0
    std: float = positive(2.0)
    _centre = property(lambda self: self.mean)
    _std = property(lambda self: self.std)


@register(
    "logistic",
    formula="F(l) = sig((l - mu) / s)",
    source="k-diffusion, log-logistic sigma (loc, scale): mu = -2 loc, s = 2 scale",
    note="mu = 0, s = 2 (this library's default) is flow_uniform.",
)
@dataclass(frozen=True)
class Logistic(LogisticShape):
    """Logistic law: a log-logistic sigma with location -mu / 2 and scale s / 2."""

    placement = Placement("mu", "s")
    mu: float = 0.0
    s: float = positive(2.0)
    _scale = property(lambda self: self.s)


@register(
    "split_normal",
    formula="2 exp(-((l - mu) / std)^2 / 2) / (sqrt(2 pi) (std_noisy + std_clean)), std = "
    "std_noisy below mu, std_clean above",
    source="k-diffusion, split log-normal sigma (loc, scale_1, scale_2): mu = -2 loc, std_clean = "
    "2 scale_1, std_noisy = 2 scale_2",
    note="mu = 0 and equal widths of 2, the normal law, are this library's defaults.",
    example={"std_noisy": 3.0, "std_clean": 1.0},
)
@dataclass(frozen=True)
class SplitNormal(Density):
    """A normal law with its own width on either side of its mode, continuous there."""

    placement = Placement("mu")
    mu: float = 0.0
    std_noisy: float = positive(2.0)
    std_clean: float = positive(2.0)

    def pdf(self, log_snr: Tensor) -> Tensor:
        z = log_snr - self.mu
        bell = torch.exp(-0.5 * (z / self._width(z)).square())
        return 2 * bell / (math.sqrt(2 * math.pi) * (self.std_noisy + self.std_clean))

    def cdf(self, log_snr: Tensor) -> Tensor:
        tail = self._tail(log_snr - self.mu)
        return torch.where(log_snr - self.mu <= 0, tail, 1 - tail)

    def sf(self, log_snr: Tensor) -> Tensor:
        tail = self._tail(log_snr - self.mu)
        return torch.where(log_snr - self.mu > 0, tail, 1 - tail)

    def icdf(self, probability: Tensor) -> Tensor:
        both = self.std_noisy + self.std_clean
        lower = torch.special.ndtri(probability * both / (2 * self.std_noisy))
        upper = torch.special.ndtri((1 - probability) * both / (2 * self.std_clean))
        below = probability <= self.std_noisy / both
        return self.mu + torch.where(below, self.std_noisy * lower, -self.std_clean * upper)

    def _width(self, z: Tensor) -> Tensor:
        return torch.where(z <= 0, torch.full_like(z, self.std_noisy), self.std_clean)

    def _tail(self, z: Tensor) -> Tensor:
        """Mass beyond mu + z, on the side of mu where it lies."""
        width = self._width(z)
        share = width / (self.std_noisy + self.std_clean)
        return share * torch.erfc(z.abs() / (width * math.sqrt(2)))


@register(
    "log_snr_uniform",
    formula="1 / (high - low) between low and high, 0 elsewhere",
    source="k-diffusion, log-uniform sigma; arXiv 2107.00630 with a linear gamma",
    note="-5 and 13.3 are the ends from which arXiv 2107.00630 starts on CIFAR-10.",
)
@dataclass(frozen=True)
class LogSnrUniform(Density):
    """Uniform in log-SNR between two levels; ValueError unless low is below high."""

    low: float = -5.0
    high: float = 13.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise ValueError(f"low={self.low!r} must be below high={self.high!r}: swap them.")

    @property
    def support(self) -> tuple[float, float]:
        return self.low, self.high

    def pdf(self, log_snr: Tensor) -> Tensor:
        inside = (log_snr >= self.low) & (log_snr <= self.high)
        return inside.to(log_snr.dtype) / (self.high - self.low)

    def cdf(self, log_snr: Tensor) -> Tensor:
        return ((log_snr - self.low) / (self.high - self.low)).clamp(0, 1)

    def sf(self, log_snr: Tensor) -> Tensor:
        return ((self.high - log_snr) / (self.high - self.low)).clamp(0, 1)

    def icdf(self, probability: Tensor) -> Tensor:
        return self.low + probability * (self.high - self.low)
