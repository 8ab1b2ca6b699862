"""The tests that samplers must pass and that broken samplers must fail, at one set of thresholds.

All take counts per level (index 0 = cleanest). What "iid" counts may scatter depends on the draw:

- antithetic pairs correlate cells: the chi-square statistic is a sum of terms l z^2 with
  0 <= l <= 2 and total at most the degrees of freedom, so twice a chi-square of half of them is an
  upper bound of its tail, and half the sample size one for Kolmogorov's test;
- stratified, systematic and Sobol counts scatter less than iid ones: an upper tail stays valid, and
  a theorem bounds the deviation of cumulative counts, far more sharply than any iid test could.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from diffusers_curriculum.randomness import DRAWS
from tests.floors_fixtures import SCHEDULERS

# density -> (parameters, the law in scipy); uniform has no law of log-SNR but the schedule's own
LAWS: dict[str, tuple[dict[str, float], Any]] = {
    "uniform": ({}, None),
    "laplace": ({"mu": 0.0, "b": 0.5}, stats.laplace(0, 0.5)),
    "cauchy": ({}, stats.cauchy(0, 1)),
    "cosine": ({}, stats.hypsecant(0, 2)),
    "cosine_shifted": ({"mu": 1.0}, stats.hypsecant(1, 2)),
    "cosine_scaled": ({}, stats.hypsecant(0, 1)),
    "normal": ({"mean": 2.4, "std": 2.4}, stats.norm(2.4, 2.4)),
}
DRAWN = 1_024_000
# chi-square and Kolmogorov for every density x scheduler x draw
COMPARISONS = 2 * len(LAWS) * len(SCHEDULERS) * len(DRAWS)
SIGNIFICANCE = 1e-4 / COMPARISONS
STANDARD_ERRORS = 4.0


def counts_of(indices: Tensor, levels: int) -> np.ndarray:
    """(T,) how often each level was drawn."""
    return torch.bincount(indices, minlength=levels).numpy()


def batches_of(draw: str) -> int:
    """Number of global batches in which ``DRAWN`` draws are made: one where strata are cut in each
    batch, so that a deviation of two draws in a million shows."""
    return 1 if draw in ("stratified", "systematic") else 10


def draw_counts(sampler: Any) -> np.ndarray:
    """(T,) counts of ``DRAWN`` draws of ``sampler`` in consecutive steps."""
    size, batches = len(sampler.levels), batches_of(sampler.draw)
    parts = (sampler.sample(DRAWN // batches, step=step).indices for step in range(batches))
    return np.sum([counts_of(part, size) for part in parts], axis=0)


def exact_cdf(name: str, edges: Tensor) -> np.ndarray:
    """(T+1,) share of draws cleaner than each edge under the density cut to the schedule, by
    scipy: at cell edges the discrete law and the continuous one agree exactly."""
    law = LAWS[name][1]
    if law is None:
        return np.arange(len(edges)) / (len(edges) - 1)
    lam = edges.numpy()
    lower_half = lam <= law.median()
    total = law.cdf(lam[0]) - law.cdf(lam[-1])
    cleaner = np.where(lower_half, law.cdf(lam[0]) - law.cdf(lam), law.sf(lam) - law.sf(lam[0]))
    return cleaner / total


def pool(counts: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring cells joined until each expects 5 or more."""
    starts, run = [0], 0.0
    for i, wanted in enumerate(expected):
        if run >= 5:
            starts.append(i)
            run = 0.0
        run += wanted
    if run < 5 and len(starts) > 1:  # the rest joins the last cell
        starts.pop()
    return np.add.reduceat(counts, starts), np.add.reduceat(expected, starts)


def chi_square(counts: np.ndarray, mass: np.ndarray, draw: str = "iid") -> float:
    """p-value of Pearson's test (its upper tail) of ``counts`` against ``mass``."""
    if counts[mass == 0].any():
        return 0.0
    pooled, expected = pool(counts, mass * counts.sum())
    statistic, freedom = float(((pooled - expected) ** 2 / expected).sum()), len(expected) - 1
    spread = 2.0 if draw == "antithetic" else 1.0
    return float(stats.chi2.sf(statistic / spread, freedom / spread)) if freedom else 1.0


def kolmogorov(counts: np.ndarray, cdf: np.ndarray, draw: str = "iid") -> float:
    """p-value of Kolmogorov's test at the cell edges, where it is exact for the continuous law."""
    total = counts.sum()
    distance = np.abs(np.cumsum(counts) / total - cdf[1:]).max()
    effective = total / 2 if draw == "antithetic" else total
    return float(stats.kstwobign.sf(math.sqrt(effective) * distance))


def deviation_bound(draw: str) -> float:
    """How far cumulative counts may be from their expectation, by theorem."""
    if draw in ("stratified", "systematic"):  # one stratum of a batch straddles each edge
        return float(batches_of(draw))
    if draw == "sobol":  # one elementary interval per binary digit
        return math.log2(DRAWN) + 2
    return math.inf


def deviation(counts: np.ndarray, mass: np.ndarray) -> float:
    """Largest distance of cumulative counts from their expectation."""
    return float(np.abs(np.cumsum(counts) - counts.sum() * np.cumsum(mass)).max())


def rejections(counts: np.ndarray, mass: np.ndarray, cdf: np.ndarray, draw: str) -> list[str]:
    """Names of the tests that reject ``counts``, from :func:`draw_counts`, as draws of ``mass``
    (T,) and of ``cdf`` (T+1,)."""
    found = {
        "chi-square": chi_square(counts, mass, draw) < SIGNIFICANCE,
        "kolmogorov": kolmogorov(counts, cdf, draw) < SIGNIFICANCE,
        "evenness": deviation(counts, mass) > deviation_bound(draw),
    }
    return [name for name, rejected in found.items() if rejected]


# -- unbiasedness ----------------------------------------------------------------------------------


def probe_functions(log_snr: Tensor) -> dict[str, Tensor]:
    """f(level) whose means are compared: 1, t, SNR, and indicators of ten bins of levels."""
    count = len(log_snr)
    t = torch.arange(count, dtype=torch.float64)
    snr = log_snr.exp()
    bins = (t * 10 / count).long()
    indicators = {f"bin {b}": (bins == b).double() for b in range(10)}
    return {"1": torch.ones_like(t), "t": t, "snr": snr, **indicators}


def standard_errors(
    indices: Tensor, importance: Tensor, f: Tensor, mass: Tensor, reference: Tensor
) -> float:
    """How many iid standard errors the mean of importance * f is away from its exact value under
    ``reference``; the error follows from the exact law, not from the sample."""
    weight = torch.where(mass > 0, reference / mass, 0.0)
    exact = float((reference * f).sum())
    variance = float((mass * (weight * f) ** 2).sum()) - exact**2
    error = math.sqrt(max(variance, 0.0) / len(indices))
    mean = float((importance.double() * f[indices]).mean())
    # float32 importance is good to 6e-8: where the variance is 0 that is all there is
    return abs(mean - exact) / max(error, 1e-6 * abs(exact), 1e-12)


def biased(
    indices: Tensor, importance: Tensor, log_snr: Tensor, mass: Tensor, reference: Tensor
) -> list[str]:
    """The functions whose mean is more than four standard errors off."""
    return [
        name
        for name, f in probe_functions(log_snr).items()
        if standard_errors(indices, importance, f, mass, reference) > STANDARD_ERRORS
    ]


# -- ranks -----------------------------------------------------------------------------------------


def correlated(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two series correlate more than four standard errors."""
    return abs(float(np.corrcoef(a, b)[0, 1])) > STANDARD_ERRORS / math.sqrt(len(a))


def strata_missed(indices: Tensor, mass: Tensor) -> int:
    """How many of the n strata of a global batch cannot have been hit exactly once, judged by the
    levels drawn: sorted, level number j must reach into stratum j of the cdf."""
    count, cdf = len(indices), np.concatenate([[0.0], np.cumsum(mass.numpy())])
    drawn = np.sort(indices.numpy())
    edges = np.arange(count + 1) / count
    reaches = [
        cdf[level] <= high + 1e-9 and cdf[level + 1] >= low - 1e-9
        for level, (low, high) in zip(drawn, pairwise(edges), strict=True)
    ]
    return int(count - sum(reaches))
