"""What a sampler hands out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TimestepSample(NamedTuple):
    """One draw of noise levels.

    Attributes:
        timesteps: (B,) in the dtype that the scheduler and the model expect.
        indices: (B,) int64, position in ``sampler.levels``, 0 = cleanest; of a continuous draw, the
            level in whose cell it fell.
        importance: (B,) float32, factor of each sample's loss; ones unless a correction is on.
        log_snr: (B,) float64 (float32 on MPS), the noise level of a continuous draw, finite; None
            where the levels are those of the table.
    """

    timesteps: Tensor
    indices: Tensor
    importance: Tensor
    log_snr: Tensor | None = None

    @property
    def at(self) -> Tensor:
        """(B,) the noise level as :class:`~diffusers_curriculum.objective.Objective` takes it: the
        log-SNR of a continuous draw, else the index."""
        return self.indices if self.log_snr is None else self.log_snr
