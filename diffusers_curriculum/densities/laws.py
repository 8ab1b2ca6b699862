"""Laws in closed form: each is symmetric about its centre and given by its lower half."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_curriculum.densities.base import SymmetricDensity, positive, register


@register("laplace")
@dataclass(frozen=True)
class Laplace(SymmetricDensity):
    """p(l) = exp(-|l - mu| / b) / (2 b) (arXiv 2407.03297; mu = 0, b = 0.5 reported at 256 pixels,
    b = 0.75 at 512)."""

    mu: float = 0.0
    b: float = positive(0.5)

    def _pdf(self, z: Tensor) -> Tensor:
        return torch.exp(-z.abs() / self.b) / (2 * self.b)

    def _lower_cdf(self, z: Tensor) -> Tensor:
        return torch.exp(z / self.b) / 2

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return self.b * torch.log(2 * p)


@register("cauchy")
@dataclass(frozen=True)
class Cauchy(SymmetricDensity):
    """p(l) = gamma / (pi ((l - mu)^2 + gamma^2)) (arXiv 2407.03297 names the law; gamma = 1 is
    this library's default)."""

    mu: float = 0.0
    gamma: float = positive(1.0)

    def _pdf(self, z: Tensor) -> Tensor:
        return self.gamma / (math.pi * (z.square() + self.gamma**2))

    def _lower_cdf(self, z: Tensor) -> Tensor:
        return torch.atan2(torch.full_like(z, self.gamma), -z) / math.pi

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return -self.gamma / torch.tan(math.pi * p)


class _HyperbolicSecant(SymmetricDensity):
    """p(mu + z) = s sech(s z / 2) / (2 pi)."""

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


@register("cosine")
@dataclass(frozen=True)
class Cosine(_HyperbolicSecant):
    """p(l) = sech(l / 2) / (2 pi): the law of the cosine schedule alpha = cos(pi t / 2) under
    uniform t (arXiv 2407.03297)."""


@register("cosine_shifted")
@dataclass(frozen=True)
class CosineShifted(_HyperbolicSecant):
    """p(l) = sech((l - mu) / 2) / (2 pi): the cosine law moved to mu (arXiv 2301.11093 shifts by
    2 ln(64 / resolution))."""

    mu: float = 0.0


@register("cosine_scaled")
@dataclass(frozen=True)
class CosineScaled(_HyperbolicSecant):
    """p(l) = s sech(s l / 2) / (2 pi): the cosine law with its axis divided by s (arXiv 2407.03297
    names the law; s = 2 is this library's default)."""

    s: float = positive(2.0)


@register("normal")
@dataclass(frozen=True)
class Normal(SymmetricDensity):
    """Normal law of log-SNR: EDM's log-normal sigma is N(-2 P_mean, (2 P_std)^2), a logit-normal
    noise fraction (m, s) is N(-2 m, (2 s)^2)."""

    mean: float = 0.0
    std: float = positive(2.0)

    @property
    def _centre(self) -> float:
        return self.mean

    def _pdf(self, z: Tensor) -> Tensor:
        return torch.exp(-0.5 * (z / self.std).square()) / (self.std * math.sqrt(2 * math.pi))

    def _lower_cdf(self, z: Tensor) -> Tensor:
        return torch.erfc(-z / (self.std * math.sqrt(2))) / 2  # ndtr is 0 below -8

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return self.std * torch.special.ndtri(p)
