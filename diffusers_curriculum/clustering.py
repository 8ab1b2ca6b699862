"""Timesteps grouped into clusters of like difficulty: contiguous runs of a schedule's levels.

A clustering is the tuple of first indices of its clusters, cleanest first: (0, s1, s2, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels

CLUSTERINGS = ("log_snr", "snr", "log_snr_width", "quantile", "uniform", "explicit")


def cluster_starts(
    levels: NoiseLevels,
    clusters: int = 20,
    method: str = "log_snr",
    *,
    masses: Tensor | None = None,
    boundaries: Sequence[float] | None = None,
    center: str = "median",
    min_size: int | None = None,
) -> tuple[int, ...]:
    """First indices of ``clusters`` contiguous clusters of noise levels.

    Args:
        method: "log_snr" or "snr": the partition of least L1 distance to the clusters' centres in
            log-SNR or raw SNR, by dynamic programming (arXiv 2306.00354); "log_snr_width": equal
            widths of log-SNR; "quantile": equal ``masses``; "uniform": equal numbers of timesteps;
            "explicit": ``boundaries``.
        masses: (T,) base probabilities, for "quantile".
        boundaries: for "explicit": the first index of each cluster (integers, the first is 0), or
            the log-SNR of each boundary between clusters (floats, decreasing).
        center: "median" (L1-optimal) or "ant" (the index one to the right of it that the public
            code of arXiv 2306.00354 takes), for the dynamic programs.
        min_size: least number of levels in a cluster, for the dynamic programs; default
            max(1, T // (10 clusters)) for "log_snr", 1 for "snr".

    A level at infinite log-SNR joins the neighbouring cluster in the dynamic programs and in equal
    widths.

    Raises:
        ValueError: unknown names, more clusters than levels, an empty cluster, or boundaries that
            do not partition the levels.
    """
    if method not in CLUSTERINGS:
        raise ValueError(f"clustering {method!r} is unknown: choose from {', '.join(CLUSTERINGS)}.")
    if (boundaries is not None) != (method == "explicit"):
        raise ValueError("clustering 'explicit' and boundaries go together: give both or neither.")
    if boundaries is not None:
        return _explicit(levels, boundaries)
    _check_count(clusters, len(levels))
    first, stop = _finite_run(levels)
    log_snr = levels.log_snr[first:stop].cpu().numpy()
    if method in ("log_snr", "snr"):
        values = log_snr if method == "log_snr" else np.exp(log_snr)
        default_size = len(levels) // (10 * clusters) if method == "log_snr" else 1
        size = max(1, default_size) if min_size is None else min_size
        starts, _ = optimal_partition(values, clusters, center=center, min_size=size)
        return (0, *(first + s for s in starts[1:]))
    if min_size is not None:
        raise ValueError(
            f"min_size={min_size} has no effect with clustering {method!r}: leave it out."
        )
    if method == "uniform":
        return tuple(len(levels) * i // clusters for i in range(clusters))
    if method == "quantile":
        return _starts_of(_quantile_cells(masses, clusters), clusters, method)
    cells = log_snr_cells(log_snr, clusters)
    return _starts_of(np.pad(cells, (first, len(levels) - stop), mode="edge"), clusters, method)


def optimal_partition(
    values: np.ndarray, clusters: int, *, center: str = "median", min_size: int = 1
) -> tuple[tuple[int, ...], float]:
    """The contiguous partition of monotone ``values`` (T,) that minimises
    sum_i sum_{t in I_i} |values_t - values_center(i)| (arXiv 2306.00354), and its cost.

    Exact, O(clusters T^2) time, O(T^2) memory.

    Raises:
        ValueError: unknown center, or more clusters than fit.
    """
    _check_count(clusters, len(values))
    if min_size < 1 or clusters * min_size > len(values):
        raise ValueError(
            f"{clusters} clusters of at least min_size={min_size} levels do not fit "
            f"{len(values)} levels: choose fewer clusters or a smaller min_size."
        )
    cost = _segment_costs(np.asarray(values, dtype=np.float64), center, min_size)
    best, cuts = cost[0], []
    for _ in range(clusters - 1):
        # best[j] = least cost of levels 0..j; the last segment starts at i, after a prefix to i - 1
        total = best[:-1, None] + cost[1:, :]
        cuts.append(total.argmin(axis=0) + 1)
        best = total.min(axis=0)
    starts, end = [], len(values) - 1
    for cut in reversed(cuts):
        starts.append(int(cut[end]))
        end = starts[-1] - 1
    return (0, *reversed(starts)), float(best[-1])


def log_snr_cells(log_snr: np.ndarray, clusters: int) -> np.ndarray:
    """(T,) cell of each level when the log-SNR range is cut into half-open cells of equal width."""
    depth = (log_snr[0] - log_snr) / (log_snr[0] - log_snr[-1])
    return np.minimum((depth * clusters).astype(int), clusters - 1)


def _segment_costs(values: np.ndarray, center: str, min_size: int) -> np.ndarray:
    """(T, T): cost of the segment from row to column, infinite where not allowed."""
    if center not in _CENTERS:
        raise ValueError(f"center={center!r} is unknown: choose from {', '.join(_CENTERS)}.")
    count = len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    left, right = np.arange(count)[:, None], np.arange(count)[None, :]
    middle = np.clip(_CENTERS[center](left, right), 0, count - 1)
    middle = np.minimum(np.maximum(middle, left), np.maximum(right, left))
    pivot = values[middle]
    before = np.abs((sums[middle + 1] - sums[left]) - (middle + 1 - left) * pivot)
    after = np.abs((sums[right + 1] - sums[middle + 1]) - (right - middle) * pivot)
    return np.where(right - left + 1 >= min_size, before + after, np.inf)


_CENTERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "median": lambda left, right: (left + right) // 2,
    "ant": lambda left, right: np.rint((left + right + 1) / 2).astype(int),  # half to even
}


def _quantile_cells(masses: Tensor | None, clusters: int) -> np.ndarray:
    if masses is None:
        raise ValueError("clustering 'quantile' needs the base probabilities: pass masses.")
    mass = masses.cpu().double().numpy()
    middle = np.cumsum(mass) - mass / 2
    return np.minimum((middle / mass.sum() * clusters).astype(int), clusters - 1)


def _starts_of(cells: np.ndarray, clusters: int, method: str) -> tuple[int, ...]:
    empty = sorted(set(range(clusters)) - set(cells.tolist()))
    if empty:
        raise ValueError(
            f"clustering {method!r} leaves {len(empty)} of {clusters} clusters empty on this "
            "schedule: choose fewer clusters or clustering 'log_snr'."
        )
    return tuple(int(i) for i in np.searchsorted(cells, np.arange(clusters)))


def _explicit(levels: NoiseLevels, boundaries: Sequence[float]) -> tuple[int, ...]:
    if any(isinstance(b, float) for b in boundaries):
        edges = np.asarray(boundaries, dtype=float)
        starts = [0, *np.searchsorted(-levels.log_snr.cpu().numpy(), -edges).tolist()]
    else:
        starts = [int(b) for b in boundaries]
    rising = all(a < b for a, b in pairwise(starts))
    if not starts or starts[0] != 0 or not rising or starts[-1] >= len(levels):
        raise ValueError(
            f"boundaries={list(boundaries)} do not partition {len(levels)} levels: give first "
            "indices 0 < s1 < s2 < ... below that number, or decreasing log-SNR values as floats."
        )
    return tuple(starts)


def _finite_run(levels: NoiseLevels) -> tuple[int, int]:
    finite = levels.finite.nonzero().flatten()
    return int(finite[0]), int(finite[-1]) + 1


def _check_count(clusters: int, count: int) -> None:
    if isinstance(clusters, bool) or not isinstance(clusters, int) or not 1 <= clusters <= count:
        raise ValueError(
            f"clusters={clusters!r} must be a whole number from 1 to {count} (levels)."
        )
