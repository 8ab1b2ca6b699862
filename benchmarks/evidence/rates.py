"""Learning rates tuned alike: each method at the best of a grid, against uniform at its best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.evidence.results import REFERENCE, Result, Results, over_tasks, step_ratios
from benchmarks.evidence.tables import plus_minus, table


def rates_table(results: Results) -> list[str]:
    """Final quality at each rate, and steps saved with both methods at their best; nothing where
    no cell has a rate of its own."""
    lines: list[str] = []
    for task, target in results.pairs():
        tried = {m: found for m, found in _by_method(results, task, target) if len(found) > 1}
        if REFERENCE not in tried:
            continue
        rates = sorted({_rate(result) for found in tried.values() for result in found})
        best = {method: min(found, key=_final) for method, found in tried.items()}
        rows = [_row(tried[m], best[m], best[REFERENCE], rates) for m in tried]
        heads = ["method", *(f"at {rate:g}" for rate in rates), "best", "steps saved, both at best"]
        lines += [f"### {task}, {target}, by learning rate", "", *table(heads, rows), ""]
    return ["## Learning rates", "", *_ABOUT, "", *lines] if lines else []


_ABOUT = (
    "Final quality at each learning rate of the grid, half and twice the usual one; and steps",
    "saved, with each method and uniform draws at the rate at which its final quality is best.",
)


def _by_method(results: Results, task: str, target: str) -> Iterator[tuple[str, list[Result]]]:
    """What was measured of each method, one result for each rate, the reference first."""
    found = results.of_pair(task, target)
    for method in dict.fromkeys(result.method for result in found):
        yield method, [result for result in found if result.method == method]


def _row(
    found: Sequence[Result], best: Result, reference: Result, rates: Sequence[float]
) -> list[str]:
    at = {_rate(result): plus_minus(result.mean(result.quality)) for result in found}
    saved = "-" if best.name == reference.name else str(over_tasks([step_ratios(reference, best)]))
    return [best.method, *(at.get(rate, "-") for rate in rates), f"{_rate(best):g}", saved]


def _rate(result: Result) -> float:
    return result.document["config"]["settings"]["learning_rate"]


def _final(result: Result) -> float:
    """Geometric mean over the seeds; infinite where one was not finite."""
    mean = float(np.log(result.values(result.quality)).mean())
    return mean if np.isfinite(mean) else np.inf
