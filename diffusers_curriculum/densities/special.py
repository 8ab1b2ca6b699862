"""The regularised incomplete beta function, which torch does not have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUNDS = 2000  # about 5 sqrt(max(a, b)) are needed
_TINY = 1e-300


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
