"""How a law, a floor and an importance correction make the mass that is drawn."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from diffusers_curriculum.checks import is_finite
from diffusers_curriculum.noise_levels import to_device

CPU = torch.device("cpu")
Tables = TypeVar("Tables")


def compose(law: Tensor, reference: Tensor, floor: float, exponent: float) -> tuple[Tensor, Tensor]:
    """(mass, importance) of a law with a floor: m = (1 - floor) p + floor q and
    (q / m)^k / sum(m (q / m)^k), 1 where q is 0; any leading dimensions."""
    mass = law if floor == 0 else (1 - floor) * law + floor * reference
    if exponent == 0:
        return mass, torch.ones_like(mass)
    drawn = mass >= torch.finfo(mass.dtype).tiny  # of less, reference / mass would be infinite
    ratio = torch.where(drawn, reference / mass, 1.0).pow(exponent)
    return mass, ratio / (mass * ratio).sum(-1, keepdim=True)


def tables(mass: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The cdf (..., T), its last entry exactly 1, and the importance as float32."""
    cdf = mass.cumsum(-1)
    return cdf / cdf.narrow(-1, -1, 1), importance.float()


def correction_exponent(correction: str | float) -> float:
    """0 for "none", 1 for "full", or the number itself in [0, 1]."""
    names = {"none": 0.0, "full": 1.0}
    value = names.get(correction, correction) if isinstance(correction, str) else correction
    if isinstance(value, str) or not (is_finite(value) and 0 <= value <= 1):
        raise ValueError(
            f"importance_correction={correction!r} must be 'none', 'full' or a number from 0 to 1."
        )
    return float(value)


def copy_on(device: torch.device, copies: dict[torch.device, Tables]) -> Tables:
    """The copy on ``device``, made once, as a step must not wait for one, of tables whose copies so
    far are given: one on the CPU at least."""
    if device not in copies:
        copies[device] = to_device(copies[CPU], device)
    return copies[device]


def pick(table: Tensor, indices: Tensor) -> Tensor:
    """``table[indices]`` for a table (T,), by the quicker call where there is one."""
    return table.index_select(0, indices) if indices.dim() == 1 else table[indices]
