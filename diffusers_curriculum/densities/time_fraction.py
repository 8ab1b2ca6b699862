"""The reference law, uniform over timesteps, and through it laws of a schedule's own time fraction
tau, that of single timesteps among them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffusers_curriculum.checks import above_zero, checked, whole
from diffusers_curriculum.densities.base import ScheduleDensity, inverse, register


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
        _, low, high = self._cell(log_snr)
        inside = (log_snr > self._rising[0]) & (log_snr <= self._rising[-1])
        return torch.where(inside, 1 / (self._count * (high - low)), 0.0)

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
        cell = (torch.searchsorted(rising, log_snr.contiguous()) - 1).clamp(0, self._count - 1)
        return cell, rising[cell], rising[cell + 1]

    @property
    def _rising(self) -> Tensor:
        return self.edges.flip(0)

    @property
    def _count(self) -> int:
        return len(self.edges) - 1


@dataclass(frozen=True, eq=False)
class TimeDensity(ScheduleDensity):
    """A law of tau in [0, 1], 0 = clean: timestep number i of T owns [i / T, (i + 1) / T].

    A subclass gives :meth:`time_pdf` and :meth:`time_cdf`, G. With U the reference law, uniform
    over timesteps, tau = 1 - U(l), hence F(l) = 1 - G(tau) and p(l) = g(tau) u(l), on every
    schedule; the mass of a timestep is G((i + 1) / T) - G(i / T).
    """

    def time_pdf(self, tau: Tensor) -> Tensor:
        """g: density per unit of tau."""
        raise NotImplementedError

    def time_cdf(self, tau: Tensor) -> Tensor:
        """G: probability of a cleaner time than tau."""
        raise NotImplementedError

    def time_sf(self, tau: Tensor) -> Tensor:
        """1 - G, without its cancellation where a subclass says how."""
        return 1 - self.time_cdf(tau)

    def time_icdf(self, probability: Tensor) -> Tensor:
        """The tau below which ``probability`` of the mass lies; by bisection, unless a subclass has
        a closed form."""
        low, high = torch.zeros_like(probability), torch.ones_like(probability)
        return inverse(self.time_cdf, self.time_sf, probability, low, high)

    @property
    def support(self) -> tuple[float, float]:
        return self._reference.support

    def pdf(self, log_snr: Tensor) -> Tensor:
        width = self._reference.pdf(log_snr)
        # beyond the schedule the width is 0, and the law may be infinite at 0 and 1
        tau = torch.where(width > 0, self._reference.sf(log_snr), 0.5)
        return self.time_pdf(tau) * width

    def cdf(self, log_snr: Tensor) -> Tensor:
        return self.time_sf(self._reference.sf(log_snr))

    def sf(self, log_snr: Tensor) -> Tensor:
        return self.time_cdf(self._reference.sf(log_snr))

    def icdf(self, probability: Tensor) -> Tensor:
        return self._reference.icdf(1 - self.time_icdf(1 - probability))

    def masses(self, edges: Tensor) -> Tensor:
        if not torch.equal(edges, self.edges):
            return super().masses(edges)
        tau = torch.arange(len(edges), dtype=edges.dtype, device=edges.device) / (len(edges) - 1)
        below, above = self.time_cdf(tau), self.time_sf(tau)
        return torch.where(below[:-1] < 0.5, below.diff(), -above.diff()).clamp_min(0.0)

    @cached_property
    def _reference(self) -> UniformTimestep:
        return UniformTimestep(self.edges)


class PiecewiseTime(TimeDensity):
    """A law of tau that is constant between knots."""

    @property
    def _weights(self) -> list[tuple[float, float]]:
        """(end of the piece, its density up to a common factor), rising; the last ends at 1."""
        raise NotImplementedError

    @cached_property
    def _pieces(self) -> tuple[Tensor, Tensor, Tensor]:
        """Knots (K+1,), density of each piece (K,), G at the knots (K+1,)."""
        knots = torch.tensor([0.0, *(end for end, _ in self._weights)], dtype=torch.float64)
        weights = torch.tensor([weight for _, weight in self._weights], dtype=torch.float64)
        density = weights / (weights * knots.diff()).sum()
        shares = (density * knots.diff()).cumsum(0)
        return knots, density, torch.cat([torch.zeros_like(shares[:1]), shares])

    def time_pdf(self, tau: Tensor) -> Tensor:
        return self._pieces[1][self._piece(tau)]

    def time_cdf(self, tau: Tensor) -> Tensor:
        knots, density, below = self._pieces
        piece = self._piece(tau)
        inner = below[piece] + density[piece] * (tau - knots[piece])
        return torch.where(tau >= 1, 1.0, inner.clamp(0, 1))

    def time_sf(self, tau: Tensor) -> Tensor:
        knots, density, _ = self._pieces
        piece = self._piece(tau)
        above = (density * knots.diff()).flip(0).cumsum(0).flip(0)
        above = torch.cat([above[1:], torch.zeros_like(above[:1])])
        inner = above[piece] + density[piece] * (knots[piece + 1] - tau)
        return torch.where(tau <= 0, 1.0, inner.clamp(0, 1))

    def _piece(self, tau: Tensor) -> Tensor:
        return torch.searchsorted(self._pieces[0][1:-1], tau.contiguous(), right=True)


@register(
    "grid",
    formula="w_i / sum(w) on the timesteps that are named, 0 on all others",
    source="the steps of a sampler, as reinforcement learning on its own way trains them "
    "(arXiv 2305.13301, arXiv 2505.05470)",
    note="0 is the cleanest; visited_indices tells those of a scheduler. A sampler's floor trains "
    "the others: use floor=0.",
    example={"timesteps": [99, 299, 499, 699, 899]},
)
@dataclass(frozen=True, eq=False)
class Grid(PiecewiseTime):
    """Some timesteps of a schedule, and no other.

    Args:
        timesteps: their numbers, 0 = cleanest, in any order.
        weights: how often each is drawn beside the others, default all alike.

    Raises:
        ValueError: no timestep, one that the schedule has not, one twice, or weights that are not
            as many, or not above 0.
    """

    timesteps: list[int] = checked(None)
    weights: list[float] | None = checked(None, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        last = len(self.edges) - 2
        if not isinstance(self.timesteps, list | tuple) or not self.timesteps:
            raise ValueError(f"timesteps={self.timesteps!r} names none: give a list of numbers.")
        for position, number in enumerate(self.timesteps):
            whole(f"timesteps[{position}]", number, 0, last)
        if len({*self.timesteps}) < len(self.timesteps):
            raise ValueError(f"timesteps={self.timesteps!r} has one twice: give each once.")
        weights = self._each
        if not isinstance(weights, list | tuple) or len(weights) != len(self.timesteps):
            raise ValueError(
                f"weights={weights!r} for {len(self.timesteps)} timesteps: give a number for each."
            )
        for position, weight in enumerate(weights):
            above_zero(f"weights[{position}]", weight)

    @property
    def _each(self) -> list[float]:
        return [1.0] * len(self.timesteps) if self.weights is None else self.weights

    @property
    def _weights(self) -> list[tuple[float, float]]:
        count, pieces, done = len(self.edges) - 1, list[tuple[float, float]](), 0
        for number, weight in sorted(zip(self.timesteps, self._each, strict=True)):
            gap = [(number / count, 0.0)] if number > done else []
            pieces, done = [*pieces, *gap, ((number + 1) / count, float(weight))], number + 1
        return pieces if done == count else [*pieces, (1.0, 0.0)]
