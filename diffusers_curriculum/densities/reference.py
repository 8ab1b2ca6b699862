"""The reference law: uniform over the timesteps of a schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_curriculum.densities.base import ScheduleDensity, register


@register(
    "uniform",
    formula="mass 1 / T on each of the T timesteps",
    source="arXiv 2006.11239; every training script's default",
    note="The reference of floors and importance. A timestep at zero terminal SNR has the mass of "
    "any other, as an atom at minus infinity.",
)
@dataclass(frozen=True, eq=False)
class UniformTimestep(ScheduleDensity):
    """Uniform over the timesteps of a schedule, the reference law: mass 1 / T spread evenly over
    each cell of log-SNR; a level at infinite log-SNR holds its mass there, as an atom."""

    @property
    def support(self) -> tuple[float, float]:
        return float(self.edges[-1]), float(self.edges[0])

    def pdf(self, log_snr: Tensor) -> Tensor:
        rising, widths = self._rising, self._rising.diff()
        cell = torch.searchsorted(rising, log_snr.contiguous()) - 1
        inside = (cell >= 0) & (cell < len(widths))
        density = 1 / (len(widths) * widths)
        return torch.where(inside, density[cell.clamp(0, len(widths) - 1)], 0.0)

    def cdf(self, log_snr: Tensor) -> Tensor:
        cell, low, high = self._cell(log_snr)
        part = (log_snr - low) / (high - low)
        part = torch.where(low.isinf(), 1.0, part)  # the atom at -inf lies below all
        inner = (cell + part.clamp(0, 1)) / self._count
        return torch.where(log_snr.isinf(), (log_snr > 0).double(), inner)

    def sf(self, log_snr: Tensor) -> Tensor:
        cell, low, high = self._cell(log_snr)
        rest = (high - log_snr) / (high - low)
        rest = torch.where(high.isinf(), 1.0, rest)  # the atom at +inf lies above all
        inner = (self._count - 1 - cell + rest.clamp(0, 1)) / self._count
        return torch.where(log_snr.isinf(), (log_snr < 0).double(), inner)

    def icdf(self, probability: Tensor) -> Tensor:
        rising, count = self._rising, self._count
        cell = (probability * count).long().clamp(0, count - 1)
        low, high = rising[cell], rising[cell + 1]
        inner = low + (probability * count - cell) * (high - low)
        return torch.where(low.isinf(), low, torch.where(high.isinf(), high, inner))

    def masses(self, edges: Tensor) -> Tensor:
        if torch.equal(edges, self.edges):  # exactly 1 / T, free of rounding
            return torch.full_like(edges[1:], 1 / self._count)
        return super().masses(edges)

    def _cell(self, log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(cell, its noisy end, its clean end), cell 0 = noisiest."""
        rising = self._rising
        cell = torch.searchsorted(rising, log_snr.contiguous()) - 1
        cell = cell.clamp(0, self._count - 1)
        return cell, rising[cell], rising[cell + 1]

    @property
    def _rising(self) -> Tensor:
        return self.edges.flip(0)

    @property
    def _count(self) -> int:
        return len(self.edges) - 1
