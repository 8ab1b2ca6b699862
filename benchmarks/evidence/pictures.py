"""Curves of quality against steps, with bands."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.evidence.results import REFERENCE, Result, Results, step_ratios

MOST = 7  # curves of a picture besides uniform draws: the best, and the worst


def draw(results: Results, pair: tuple[str, str], folder: Path) -> Path:
    """A picture of a task and target: means over seeds, and bands of 95 %."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for result in _telling(results.of_pair(*pair)):
        means = [result.mean(result.quality, step) for step in result.steps]
        style = {"color": "black", "linewidth": 2.5} if result.method == REFERENCE else {}
        (line,) = axes.plot(result.steps, [m.value for m in means], label=result.method, **style)
        low, high = [m.low for m in means], [m.high for m in means]
        axes.fill_between(
            result.steps, np.maximum(low, 1e-9), high, color=line.get_color(), alpha=0.15
        )
    axes.set(xscale="log", yscale="log", xlabel="optimizer steps", title=", ".join(pair))
    axes.set_ylabel(f"{results.of_pair(*pair)[0].quality} (lower is better)")
    axes.legend(fontsize=8)
    file = folder / f"{'-'.join(pair)}.svg"
    figure.savefig(file, metadata={"Date": None})
    return file


def _telling(found: list[Result]) -> list[Result]:
    """The reference, and the methods that save most and least."""
    reference = found[0]
    usual = [r for r in found[1:] if not r.group]
    ranked = sorted(usual, key=lambda r: -float(np.mean(np.log(step_ratios(reference, r)))))
    return [reference, *(ranked if len(ranked) <= MOST else [*ranked[: MOST - 1], ranked[-1]])]
