"""What adaptive samplers remember of the losses they saw: means over neighbouring noise levels.

The rules are frozen; what changes is a dict of tensors that the sampler keeps, on the device of the
losses, so that a step costs no host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.checks import one_of
from diffusers_curriculum.clustering import log_snr_cells
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers.composition import pick
from diffusers_curriculum.weighting.formulas import softplus, to_target

State = dict[str, Tensor]
BINNINGS = ("quantile", "log_snr_width")


@dataclass(frozen=True, eq=False)
class Statistics:
    """A running mean for each noise level."""

    starts: tuple[int, ...]  # first level of each of the K bins

    def initial_state(self) -> State:
        """The state before the first observation."""
        raise NotImplementedError

    def add(self, state: State, indices: Tensor, values: Tensor, valid: Tensor) -> None:
        """Take in values (N,) at levels (N,), in place; those that are not valid are 0."""
        raise NotImplementedError

    def fold(self, state: State) -> None:
        """End of a window between two refreshes of the law, in place."""

    def seen(self, state: State) -> Tensor:
        """(K,) int64, number of observations of each bin."""
        raise NotImplementedError

    def rescaled(self, state: State, factor: Tensor) -> State:
        """The state had each value been ``factor`` (T,) times what it was, by its level."""
        raise NotImplementedError

    def at_levels(self, bins: Tensor) -> Tensor:
        """(T,) at each level what ``bins`` (K,) says of its bin."""
        return bins

    def touched(self, levels: Tensor) -> Tensor:
        """(K,) bool, bins with a level where ``levels`` (T,) is not 0."""
        return levels > 0

    def profile(self, state: State) -> Tensor:
        """(T,) the mean at each level."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class BinnedMeans(Statistics):
    """Means in bins of neighbouring levels, averaged over time and over neighbouring bins.

    A window's sums S and counts C enter the average as A <- ema A + S, N <- ema N + C, mean A / N:
    a window counts by its number of observations, and a bin that saw none keeps its mean.

    Attributes:
        cell: (T,) int64, bin of each level.
        spread: (T, K) float64, from means of bins to means at levels: rows sum to 1.
        ema: what remains of old observations at each fold, in [0, 1).
    """

    cell: Tensor
    spread: Tensor
    ema: float

    @classmethod
    def of(
        cls, levels: NoiseLevels, bins: int, binning: str, neighbours: int, ema: float
    ) -> BinnedMeans:
        """Bins of a schedule; arguments as of :class:`AdaptiveTimestepSampler`.

        There are fewer ``bins`` where equal widths leave some without a level; the weights of
        ``neighbours`` fall linearly.
        """
        cell, starts, _, spread = binned(levels, bins, binning)
        spread = spread @ torch.from_numpy(_smoothing(len(starts), neighbours))
        return cls(starts, cell, spread, ema)

    def initial_state(self) -> State:
        names = ("sums", "counts", "total", "evidence")
        state = {name: torch.zeros(len(self.starts), dtype=torch.float64) for name in names}
        return state | {"seen": torch.zeros(len(self.starts), dtype=torch.int64)}

    def add(self, state: State, indices: Tensor, values: Tensor, valid: Tensor) -> None:
        # not index_add_: on CUDA that adds in no fixed order, and processes would drift apart
        cell = (pick(self.cell, indices),)
        state["sums"].index_put_(cell, values, accumulate=True)
        state["counts"].index_put_(cell, valid.to(values.dtype), accumulate=True)

    def fold(self, state: State) -> None:
        counts = state["counts"]
        keep = torch.full_like(counts, self.ema).where(counts > 0, 1.0)
        state["total"] = keep * state["total"] + state["sums"]
        state["evidence"] = keep * state["evidence"] + counts
        state["seen"] = state["seen"] + counts.long()
        state["sums"], state["counts"] = torch.zeros_like(counts), torch.zeros_like(counts)

    def seen(self, state: State) -> Tensor:
        return state["seen"]

    def rescaled(self, state: State, factor: Tensor) -> State:
        """As if all levels of a bin had the same product."""
        mean = self._sums(torch.ones_like(factor)) / self._sums(1 / factor)
        return state | {name: state[name] * mean for name in ("sums", "total")}

    def at_levels(self, bins: Tensor) -> Tensor:
        return bins[self.cell]

    def touched(self, levels: Tensor) -> Tensor:
        return self._sums(levels) > 0

    def _sums(self, levels: Tensor) -> Tensor:
        """(K,) sums of ``levels`` (T,) over each bin."""
        zeros = levels.new_zeros(len(self.starts))
        return zeros.index_put_((self.cell,), levels, accumulate=True)

    def profile(self, state: State) -> Tensor:
        evidence = state["evidence"]
        known = evidence > 0
        means = self.spread @ torch.where(known, state["total"] / evidence, 0.0)
        # a bin that saw nothing is no neighbour
        share = torch.where(known.all(), 1.0, self.spread @ known.to(means.dtype))
        return torch.where(share > 0, means / share, 0.0)


@dataclass(frozen=True, eq=False)
class LastValues(Statistics):
    """The mean of the last few observations of each level, a bin by itself (arXiv 2102.09672)."""

    length: int  # observations kept of each level

    def initial_state(self) -> State:
        levels = len(self.starts)
        # one row more, for what is not to be kept
        history = torch.zeros(levels + 1, self.length, dtype=torch.float64)
        return {"history": history, "count": torch.zeros(levels + 1, dtype=torch.int64)}

    def add(self, state: State, indices: Tensor, values: Tensor, valid: Tensor) -> None:
        levels = len(self.starts)
        rows = torch.where(valid, indices, levels)
        sorted_rows, order = torch.sort(rows, stable=True)
        place = torch.arange(len(rows), device=rows.device)
        first = torch.searchsorted(sorted_rows, sorted_rows)
        after = torch.searchsorted(sorted_rows, sorted_rows, right=True)
        # of more than `length` at one level the last ones stay; no slot is written twice
        kept = (after - place <= self.length) & (sorted_rows < levels)
        slots = (state["count"][sorted_rows] + place - first) % self.length
        target = torch.where(kept, sorted_rows, levels)
        state["history"][target, slots] = values[order] * kept
        state["count"].index_add_(0, rows, torch.ones_like(rows))

    def seen(self, state: State) -> Tensor:
        return state["count"][:-1]

    def rescaled(self, state: State, factor: Tensor) -> State:
        rows = torch.cat([factor, torch.ones_like(factor[:1])])
        return state | {"history": state["history"] * rows[:, None]}

    def profile(self, state: State) -> Tensor:
        known = state["count"][:-1].clamp(1, self.length)
        return state["history"][:-1].sum(1) / known


def binned(
    levels: NoiseLevels, bins: int, binning: str
) -> tuple[Tensor, tuple[int, ...], Tensor, Tensor]:
    """Bins of a schedule: the bin of each level (T,), the first level of each bin, the mean
    log-SNR of each (K,), and the interpolation between those means, (T, K) with rows that sum to
    1; constant beyond the outer ones."""
    cell = _cells(levels, bins, binning)
    count = int(cell[-1]) + 1
    starts = torch.searchsorted(cell, torch.arange(count)).tolist()
    position = levels.positions.numpy()
    centres = np.array([part.mean() for part in np.split(position, starts[1:])])
    # np.interp wants a rising axis
    columns = [np.interp(-position, -centres, row) for row in np.eye(count)]
    spread = torch.from_numpy(np.stack(columns, axis=1))
    return cell, tuple(starts), torch.from_numpy(centres), spread


def x0_scale(levels: NoiseLevels) -> Tensor:
    """(T,) float64 what the unweighted loss of a target is times, to be (1 + S) times the squared
    error of x0: that changes little within a bin, at either end."""
    on_target = to_target(levels.prediction_type, levels.positions, levels.sigma_data)
    return (on_target + softplus(levels.positions)).exp()


def finite_widths(levels: NoiseLevels) -> Tensor:
    """(T,) width of each level's cell in log-SNR; an infinite one counts as its neighbour's."""
    widths = -levels.edges.diff()
    for end, neighbour in ((0, 1), (-1, -2)):
        if not bool(widths[end].isfinite()):
            widths[end] = widths[neighbour]
    return widths


def _cells(levels: NoiseLevels, bins: int, binning: str) -> Tensor:
    one_of("binning", binning, BINNINGS)
    if binning == "quantile":
        return torch.arange(len(levels)) * bins // len(levels)
    finite = levels.finite.nonzero().flatten()
    cells = log_snr_cells(levels.log_snr[levels.finite].numpy(), bins)
    outside = (int(finite[0]), len(levels) - 1 - int(finite[-1]))
    cells = torch.from_numpy(np.pad(cells, outside, mode="edge"))
    return torch.unique(cells, return_inverse=True)[1]


def _smoothing(count: int, neighbours: int) -> np.ndarray:
    """(K, K) averages over neighbouring bins, with weights that fall linearly; rows sum to 1."""
    distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    weights = np.maximum(neighbours + 1 - distance, 0.0)
    return weights / weights.sum(1, keepdims=True)
