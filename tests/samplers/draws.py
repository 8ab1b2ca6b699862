"""A draw as the list of what it holds."""

from __future__ import annotations

from torch import Tensor

from diffusers_curriculum.samplers import TimestepSample


def parts(sample: TimestepSample) -> list[Tensor]:
    """The tensors of ``sample``: three, or four of a continuous draw."""
    return [part for part in sample if isinstance(part, Tensor)]
