"""What a sampler hands out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TimestepSample(NamedTuple):
    """One draw of noise levels.

    Attributes:
        timesteps: (B,) in the dtype that the scheduler and the model expect.
        indices: (B,) int64, position in ``sampler.levels``, 0 = cleanest.
        importance: (B,) float32, factor of each sample's loss; ones unless a correction is on.
    """

    timesteps: Tensor
    indices: Tensor
    importance: Tensor
