"""Timesteps grouped into clusters of like difficulty: contiguous runs of a schedule's levels.

A clustering is the tuple of first indices of its clusters, cleanest first: (0, s1, s2, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.checks import one_of, whole
from diffusers_curriculum.noise_levels import NoiseLevels

CLUSTERINGS: Catalogue[Callable[..., tuple[int, ...]]] = Catalogue("clustering")


def cluster_starts(
    levels: NoiseLevels,
    clusters: int = 20,
    method: str = "log_snr",
    *,
    masses: Tensor | None = None,
    **options: Any,
) -> tuple[int, ...]:
    """First indices of ``clusters`` contiguous clusters of noise levels.

    A level at infinite log-SNR joins the neighbouring cluster in the dynamic programs and in equal
    widths.

    Args:
        method: "log_snr" or "snr": the partition of least L1 distance to the clusters' centres in
            log-SNR or raw SNR, by dynamic programming (arXiv 2306.00354); "log_snr_width": equal
            widths of log-SNR; "quantile": equal ``masses``; "uniform": equal numbers of timesteps;
            "explicit": ``boundaries``.
        masses: (T,) base probabilities, for "quantile".
        options: of the method, None for its default. Of the dynamic programs ``center``, "median"
            (L1-optimal) or "ant" (the index one to the right of it that the public code of arXiv
            2306.00354 takes), and ``min_size``, the least number of levels in a cluster, default
            max(1, T // (10 clusters)) for "log_snr", 1 for "snr". Of "explicit", ``boundaries``:
            the first index of each cluster (integers, the first is 0), or the log-SNR of each
            boundary between clusters (floats, decreasing).

    Raises:
        ValueError: unknown names, more clusters than levels, an empty cluster, or boundaries that
            do not partition the levels.
    """
    function = CLUSTERINGS.look_up(method)
    if method != "explicit":
        whole("clusters", clusters, 1, len(levels))
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() - _options(function):
        others = [other for other in CLUSTERINGS if name in _options(CLUSTERINGS[other])]
        remedy = f", or choose from {', '.join(others)}" if others else ""
        raise ValueError(
            f"{name}={given[name]!r} has no effect with clustering {method!r}: leave it out"
            f"{remedy}."
        )
    if "masses" in _options(function):
        given |= {"masses": masses}
    return function(levels, clusters, **given)


def automatic(levels: NoiseLevels, law: Tensor) -> str:
    """The method for a base law (T,): "quantile", so that the newest cluster of stage n gets about
    1 / n of its draws; "log_snr", as in arXiv 2403.10348, where a variance preserving schedule is
    drawn uniformly (there it gets about that on linear betas)."""
    uniform = torch.full_like(law, 1 / len(law))
    even = torch.allclose(law, uniform, rtol=1e-9, atol=0)
    return "log_snr" if levels.family == "vp" and even else "quantile"


def automatic_before(levels: NoiseLevels) -> str:
    """What versions before took, whatever the law."""
    return "log_snr" if levels.family == "vp" else "quantile"


@CLUSTERINGS.register(
    "log_snr",
    formula="least sum of |l - l of the cluster's centre|",
    source="arXiv 2306.00354, in log-SNR",
)
def _by_log_snr(
    levels: NoiseLevels, clusters: int, center: str = "median", min_size: int | None = None
) -> tuple[int, ...]:
    size = max(1, len(levels) // (10 * clusters)) if min_size is None else min_size
    return _partition(levels, lambda log_snr: log_snr, clusters, center, size)


@CLUSTERINGS.register(
    "snr", formula="least sum of |S - S of the cluster's centre|", source="arXiv 2306.00354"
)
def _by_snr(
    levels: NoiseLevels, clusters: int, center: str = "median", min_size: int = 1
) -> tuple[int, ...]:
    return _partition(levels, np.exp, clusters, center, min_size)


@CLUSTERINGS.register("log_snr_width", formula="equal widths of l")
def _by_width(levels: NoiseLevels, clusters: int) -> tuple[int, ...]:
    first, values = _finite_log_snr(levels)
    after = len(levels) - first - len(values)
    cells = np.pad(log_snr_cells(values, clusters), (first, after), mode="edge")
    return _starts_of(cells, clusters, "log_snr_width")


@CLUSTERINGS.register("quantile", formula="equal mass of the base law")
def _by_mass(levels: NoiseLevels, clusters: int, masses: Tensor | None) -> tuple[int, ...]:
    if masses is None:
        raise ValueError("clustering 'quantile' needs the base probabilities: pass masses.")
    mass = masses.cpu().double().numpy()
    middle = np.cumsum(mass) - mass / 2
    cells = np.minimum((middle / mass.sum() * clusters).astype(int), clusters - 1)
    return _starts_of(cells, clusters, "quantile")


@CLUSTERINGS.register("uniform", formula="equal numbers of timesteps")
def _by_number(levels: NoiseLevels, clusters: int) -> tuple[int, ...]:
    return tuple(len(levels) * i // clusters for i in range(clusters))


@CLUSTERINGS.register("explicit", formula="the boundaries given")
def _explicit(
    levels: NoiseLevels, clusters: int, boundaries: Sequence[float] | None = None
) -> tuple[int, ...]:
    if boundaries is None:
        raise ValueError("clustering 'explicit' and boundaries go together: give both or neither.")
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


def optimal_partition(
    values: np.ndarray, clusters: int, *, center: str = "median", min_size: int = 1
) -> tuple[tuple[int, ...], float]:
    """The contiguous partition of monotone ``values`` (T,) that minimises
    sum_i sum_{t in I_i} |values_t - values_center(i)| (arXiv 2306.00354), and its cost.

    Exact, O(clusters T^2) time, O(T^2) memory.

    Raises:
        ValueError: unknown center, or more clusters than fit.
    """
    whole("clusters", clusters, 1, len(values))
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
    one_of("center", center, _CENTERS)
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


def _starts_of(cells: np.ndarray, clusters: int, method: str) -> tuple[int, ...]:
    empty = sorted(set(range(clusters)) - set(cells.tolist()))
    if empty:
        raise ValueError(
            f"clustering {method!r} leaves {len(empty)} of {clusters} clusters empty on this "
            "schedule: choose fewer clusters or clustering 'log_snr'."
        )
    return tuple(int(i) for i in np.searchsorted(cells, np.arange(clusters)))


def _partition(
    levels: NoiseLevels,
    value: Callable[[np.ndarray], np.ndarray],
    clusters: int,
    center: str,
    min_size: int,
) -> tuple[int, ...]:
    first, log_snr = _finite_log_snr(levels)
    starts, _ = optimal_partition(value(log_snr), clusters, center=center, min_size=min_size)
    return (0, *(first + start for start in starts[1:]))


def _finite_log_snr(levels: NoiseLevels) -> tuple[int, np.ndarray]:
    """The first level of finite log-SNR, and the log-SNR of all that are finite."""
    finite = levels.finite.cpu().numpy()
    return int(finite.argmax()), levels.log_snr.cpu().numpy()[finite]


def _options(clustering: Callable[..., tuple[int, ...]]) -> frozenset[str]:
    """What a clustering takes besides levels and their number."""
    return frozenset(inspect.signature(clustering).parameters) - {"levels", "clusters"}
