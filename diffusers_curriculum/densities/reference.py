"""The reference law: uniform over the timesteps of a schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_curriculum.densities.base import Density, register


@register("uniform")
@dataclass(frozen=True, eq=False)
class UniformTimestep(Density):
    """Uniform over the timesteps of a schedule, the reference law: mass 1 / T spread evenly over
    each cell of log-SNR; a level at infinite log-SNR holds its mass there, as an atom."""

    edges: Tensor

    @classmethod
    def on_schedule(cls, edges: Tensor, **parameters: float) -> UniformTimestep:
        return cls(edges, **parameters)

    def pdf(self, log_snr: Tensor) -> Tensor:
        rising, widths = self._rising, self._rising.diff()
        cell = torch.searchsorted(rising, log_snr.contiguous()) - 1
        inside = (cell >= 0) & (cell < len(widths))
        density = 1 / (len(widths) * widths)
        return torch.where(inside, density[cell.clamp(0, len(widths) - 1)], 0.0)

    def cdf(self, log_snr: Tensor) -> Tensor:
        rising, count = self._rising, len(self.edges) - 1
        cell = (torch.searchsorted(rising, log_snr.contiguous()) - 1).clamp(0, count - 1)
        part = (log_snr - rising[cell]) / (rising[cell + 1] - rising[cell])
        part = torch.where(rising[cell].isinf(), 1.0, part)  # the atom at -inf lies below all
        part = torch.where(rising[cell + 1].isinf(), 0.0, part)
        inner = (cell + part.clamp(0, 1)) / count
        return torch.where(
            log_snr == -torch.inf, 0.0, torch.where(log_snr == torch.inf, 1.0, inner)
        )

    def sf(self, log_snr: Tensor) -> Tensor:
        return 1 - self.cdf(log_snr)

    def icdf(self, probability: Tensor) -> Tensor:
        rising, count = self._rising, len(self.edges) - 1
        cell = (probability * count).long().clamp(0, count - 1)
        low, high = rising[cell], rising[cell + 1]
        inner = low + (probability * count - cell) * (high - low)
        return torch.where(low.isinf(), low, torch.where(high.isinf(), high, inner))

    def masses(self, edges: Tensor) -> Tensor:
        if torch.equal(edges, self.edges):  # exactly 1 / T, free of rounding
            return torch.full_like(edges[1:], 1 / (len(edges) - 1))
        return super().masses(edges)

    @property
    def _rising(self) -> Tensor:
        return self.edges.flip(0)
