"""Quality against steps: how many steps a method saves, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from scipy import stats

from diffusers_curriculum.randomness import host_generator

MOST = 6  # values of which all resamples are looked at; of more, so many are drawn:
RESAMPLES = 20000
Curve = Sequence[tuple[float, float]]  # (steps, quality), lower is better


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def steps_to(curve: Curve, quality: float) -> float:
    """Steps at which a curve first comes down to ``quality``, interpolated between checkpoints in
    the logarithms of both; at the first checkpoint or before it, that one; infinite if never."""
    steps, first = curve[0]
    if first <= quality:
        return steps
    for (before, above), (after, below) in pairwise(curve):
        if below <= quality < above:
            share = math.log(above / quality) / math.log(above / below)
            return before * (after / before) ** share
    return math.inf


def steps_ratio(reference: Curve, method: Curve) -> float:
    """Steps of ``reference`` to the worse of both final qualities / steps of ``method`` to it:
    above 1 where the method reaches the reference's final quality sooner, below 1 where it never
    does, and the reference reached the method's own long before; nan where a curve is not finite.
    """
    if not all(math.isfinite(quality) for _, quality in (*reference, *method)):
        return math.nan
    goal = max(reference[-1][1], method[-1][1])
    needed = steps_to(reference, goal), steps_to(method, goal)
    if reference[-1][1] >= method[-1][1]:  # at its last step the reference is there, if not before
        needed = reference[-1][0], needed[1]
    else:
        needed = needed[0], method[-1][0]
    return needed[0] / needed[1]


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean with Student's interval; nan where a value is not finite."""
    array = np.asarray(values, dtype=float)
    mean, half = float(array.mean()), math.nan
    if len(array) > 1:
        spread = float(array.std(ddof=1)) / math.sqrt(len(array))
        half = float(stats.t.ppf(0.975, len(array) - 1)) * spread
    return Interval(mean, mean - half, mean + half)


def ratio_interval(groups: Sequence[Sequence[float]]) -> Interval:
    """Geometric mean over groups (tasks) of the geometric means of ratios (of seeds), with its
    bootstrap interval over the seeds of each group.

    Percentiles are expanded for few values as Hesterberg does (arXiv 1411.5279): the
    plain ones are too narrow by sqrt(n / (n - 1)) and Student's t over the normal law's quantile.
    """
    logs = [np.log(np.asarray(group, dtype=float)) for group in groups]
    value = float(np.exp(np.mean([group.mean() for group in logs])))
    fewest = min(len(group) for group in logs)
    if fewest < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    tail = expanded_tail(fewest)
    means = np.mean([_resampled(group, number) for number, group in enumerate(logs)], axis=0)
    low, high = np.exp(np.quantile(means, [tail, 1 - tail]))
    return Interval(value, float(low), float(high))


def expanded_tail(count: int) -> float:
    """The share of resampled means of ``count`` values to be cut off at each end."""
    wide = math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1)
    return float(stats.norm.cdf(-wide))


def _resampled(values: np.ndarray, number: int) -> np.ndarray:
    """(RESAMPLES,) means of values drawn with replacement; of a few, each resample as often as any
    other, dealt in a random order."""
    random = host_generator(number, purpose="evidence bootstrap")
    count = len(values)
    if count > MOST:
        return values[random.integers(count, size=(RESAMPLES, count))].mean(1)
    means = values[np.asarray([*product(range(count), repeat=count)])].mean(1)
    return random.permutation(np.resize(means, RESAMPLES))
