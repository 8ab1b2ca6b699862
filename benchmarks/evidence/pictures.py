"""Curves of quality against steps, with bands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.results import REFERENCE, Result, Results, step_ratios

MOST = 7  # curves of a picture besides uniform draws: the best, and the worst


def draw(results: Results, pair: tuple[str, str], folder: Path) -> Path:
    """A picture of a task and target: means over seeds, and bands of 95 %."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    found = _telling(results.of_pair(*pair))
    for result in found:
        batch = result.document["config"]["settings"]["batch"]
        _curve(by_steps, result, [step * batch for step in result.steps])
        _curve(by_time, result, [p["seconds"] / result.seeds for p in result.checkpoints])
    by_steps.set(xlabel=f"images seen ({batch} for each step)", title=", ".join(pair))
    by_steps.set_ylabel(f"{found[0].quality} (lower is better)")
    by_time.set_xlabel("processor seconds of training, the law's own included")
    by_steps.legend(fontsize=8)
    file = folder / f"{'-'.join(pair)}.png"
    figure.savefig(file, dpi=80)
    return file


def _curve(axes: Any, result: Result, places: list[float]) -> None:
    """The mean of the measure that decides, and its band."""
    means = [result.mean(result.quality, step) for step in result.steps]
    style = {"color": "black", "linewidth": 2.5} if result.method == REFERENCE else {}
    (line,) = axes.plot(places, [m.value for m in means], label=result.method, **style)
    low, high = [m.low for m in means], [m.high for m in means]
    least = 0.5 * min(m.value for m in means)  # a band below 0 has no place on this axis
    axes.fill_between(places, np.maximum(low, least), high, color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", yscale="log")


def _telling(found: list[Result]) -> list[Result]:
    """The reference, and the methods that save most and least."""
    reference = found[0]
    usual = [r for r in found[1:] if not r.group]
    ranked = sorted(usual, key=lambda r: -float(np.mean(np.log(step_ratios(reference, r)))))
    return [reference, *(ranked if len(ranked) <= MOST else [*ranked[: MOST - 1], ranked[-1]])]
