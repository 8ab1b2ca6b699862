"""What papers say, as comparisons of cells; the verdicts follow from the intervals alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence.curves import Interval
from benchmarks.evidence.entropy import entropy_ratios
from benchmarks.evidence.results import Result, Results, over_tasks, quality_ratios, step_ratios

CLAIMS = Path(__file__).with_name("claims.json")
REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = "reproduced", "not reproduced", "not testable here"
NOT_MEASURED = "not measured yet"
SMALLEST_DROP, LEFT = 0.05, 0.1
Ratios = Sequence[float]


class Comparison(NamedTuple):
    """Two methods, on some tasks and targets, and what came of it: above 1 speaks for the claim."""

    better: str
    worse: str
    statistic: str
    on: str
    ratio: Interval | None


class Verdict(NamedTuple):
    """A claim, its comparisons, and what follows."""

    claim: str
    source: str
    about: str
    comparisons: list[Comparison]
    verdict: str


def _steps(better: Result, worse: Result, share: float) -> Ratios:
    return step_ratios(worse, better)


def _quality(better: Result, worse: Result, share: float) -> Ratios:
    step = max(s for s in worse.steps if s <= max(share * worse.steps[-1], worse.steps[0]))
    return quality_ratios(worse, better, step=step)


def _metric(name: str) -> Callable[[Result, Result, float], Ratios]:
    return lambda better, worse, share: quality_ratios(worse, better, metric=name)


def _slower_when_clean(better: Result, worse: Result, share: float) -> Ratios:
    """Steps until a tenth of the loss that training takes away is left, by level: the geometric
    mean over levels of log-SNR above 0 / that below 0, of one method."""
    ratios = []
    for seed in range(better.seeds):
        needed = _steps_by_level(better.document, seed)
        clean = [math.log(steps) for level, steps in needed if level > 0]
        noisy = [math.log(steps) for level, steps in needed if level < 0]
        missing = not clean or not noisy
        ratios.append(math.nan if missing else math.exp(_mean(clean) - _mean(noisy)))
    return ratios


def _steps_by_level(document: Mapping[str, Any], seed: int) -> list[tuple[float, float]]:
    points = document["checkpoints"]
    found = []
    for at, level in enumerate(document["log_snr"]):
        losses = [(max(p["step"], 1), p["loss"][seed][at]) for p in points]
        drop = losses[0][1] - losses[-1][1]
        if drop < SMALLEST_DROP * losses[0][1]:  # nothing to be learned there
            continue
        left = [(step, (loss - losses[-1][1]) / drop) for step, loss in losses]
        found.append((level, _first_below(left)))
    return found


def _first_below(left: Sequence[tuple[int, float]]) -> float:
    """Steps at which the share that is left falls to LEFT, linear in it and in log steps."""
    for (before, above), (after, below) in pairwise(left):
        if below <= LEFT:
            return before * (after / before) ** ((above - LEFT) / (above - below))
    return float(left[-1][0])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _entropy(between_timesteps: bool) -> Callable[[Result, Result, float], Ratios]:
    return lambda better, worse, share: entropy_ratios(better.document["config"], between_timesteps)


STATISTICS: dict[str, Callable[[Result, Result, float], Ratios]] = {
    "steps": _steps,
    "quality": _quality,
    "quality at guidance 1.5": _metric("frechet, guidance 1.5"),
    "quality at guidance 3": _metric("frechet, guidance 3"),
    "slower at clean levels": _slower_when_clean,
    "entropy between timesteps at clean levels": _entropy(True),
    "entropy in log-SNR at clean levels": _entropy(False),
}


def judged(results: Results, file: Path = CLAIMS) -> list[Verdict]:
    """Every claim with its verdict."""
    return [verdict_on(claim, results) for claim in json.loads(file.read_text("utf-8"))]


def verdict_on(claim: Mapping[str, Any], results: Results) -> Verdict:
    """Reproduced where the interval of each of its comparisons lies above 1; not measured where a
    cell of one is missing; not testable where there are none, or one has no interval; else not
    reproduced."""
    compared = [_compared(each, results) for each in claim.get("comparisons", [])]
    ratios = [each.ratio for each in compared]
    if any(ratio is None for ratio in ratios):
        verdict = NOT_MEASURED
    elif not ratios or any(ratio is None or math.isnan(ratio.low) for ratio in ratios):
        verdict = NOT_TESTABLE
    else:
        above = all(ratio is not None and ratio.low > 1 for ratio in ratios)
        verdict = REPRODUCED if above else NOT_REPRODUCED
    return Verdict(claim["claim"], claim["source"], claim.get("about", ""), compared, verdict)


def _compared(told: Mapping[str, Any], results: Results) -> Comparison:
    statistic, groups = STATISTICS[told["statistic"]], []
    for task, target in told["on"]:
        better, worse = (results.find(task, target, told[name]) for name in ("better", "worse"))
        if better is not None and worse is not None and _has(told["statistic"], better, worse):
            groups.append(statistic(better, worse, told.get("at", 1.0)))
    complete = len(groups) == len(told["on"])
    ratio = over_tasks(groups) if complete else None
    on = ", ".join("/".join(pair) for pair in told["on"])
    return Comparison(told["better"], told["worse"], told["statistic"], on, ratio)


def _has(statistic: str, *results: Result) -> bool:
    """Whether the last checkpoints hold what a statistic needs."""
    wanted = statistic.replace("quality at", "frechet,") if " at guidance" in statistic else None
    return all(wanted is None or wanted in r.checkpoints[-1]["metrics"] for r in results)
