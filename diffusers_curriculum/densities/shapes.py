"""Shapes of symmetric laws, each given once and shared by the laws that have it.

The width is a property here, so that a law can call its parameter what its source calls it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusers_curriculum.densities.base import SymmetricDensity


class HyperbolicSecant(SymmetricDensity):
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


class NormalShape(SymmetricDensity):
    """p(mu + z) = exp(-(z / std)^2 / 2) / (std sqrt(2 pi))."""

    @property
    def _std(self) -> float:
        raise NotImplementedError

    def _pdf(self, z: Tensor) -> Tensor:
        return torch.exp(-0.5 * (z / self._std).square()) / (self._std * math.sqrt(2 * math.pi))

    def _lower_cdf(self, z: Tensor) -> Tensor:
        return torch.erfc(-z / (self._std * math.sqrt(2))) / 2  # ndtr is 0 below -8

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return self._std * torch.special.ndtri(p)


class LogisticShape(SymmetricDensity):
    """F(mu + z) = sig(z / s)."""

    @property
    def _scale(self) -> float:
        raise NotImplementedError

    def _pdf(self, z: Tensor) -> Tensor:
        decay = torch.exp(-z.abs() / self._scale)
        return decay / (self._scale * (1 + decay).square())

    def _lower_cdf(self, z: Tensor) -> Tensor:
        decay = torch.exp(z / self._scale)
        return decay / (1 + decay)

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return self._scale * (torch.log(p) - torch.log1p(-p))
