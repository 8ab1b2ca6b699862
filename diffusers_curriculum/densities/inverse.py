"""Inverses of monotone functions without a closed form, to the last bit of float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SIGN = torch.iinfo(torch.int64).min


def largest(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The largest number of [low, high] up to which ``holds`` is true, by bisection.

    The halves are halves of the floating-point numbers between ``low`` and ``high``, not of their
    distance: 64 steps reach neighbouring numbers from anywhere, infinite ends and tails included.

    Args:
        holds: elementwise test, true up to some point and false beyond; taken to hold at ``low``.
        low: float64, of the result's shape.
        high: float64, of the result's shape.
    """
    below, above = _rank(low), _rank(high)
    above = torch.where(holds(high), below, above)
    answer_high = above == below
    for _ in range(64):
        middle = (below & above) + ((below ^ above) >> 1)  # the mean, which cannot overflow
        true = holds(_number(middle))
        below, above = torch.where(true, middle, below), torch.where(true, above, middle)
        if bool(((below == above) | (below + 1 == above)).all()):
            break
    return torch.where(answer_high, high, _number(below))


def _rank(x: Tensor) -> Tensor:
    """int64 in the order of the numbers; both zeros are 0."""
    bits = x.contiguous().view(torch.int64)
    return torch.where(bits < 0, _SIGN - bits, bits)


def _number(rank: Tensor) -> Tensor:
    return torch.where(rank < 0, _SIGN - rank, rank).view(torch.float64)
