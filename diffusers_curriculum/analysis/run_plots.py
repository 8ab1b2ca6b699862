"""Runs side by side as curves: what was measured over the steps, and per noise level."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusers_curriculum.analysis.plots import COLOURS, LOG_SNR, add_legend, canvas
from diffusers_curriculum.analysis.runs import RecordedRun, at_compared_step, kinds

_AT = "log_snr_"
_MOST = 2  # columns


def plot_runs(runs: Mapping[str, RecordedRun]) -> Figure | None:
    """A panel for each metric over the steps, for each kind of loss by noise level, and for the
    training loss by noise level; None where no run has any."""
    wanted = _panels(runs)
    if not wanted:
        return None
    columns = min(_MOST, len(wanted))
    rows = -(-len(wanted) // columns)
    figure, panels = canvas(5.5 * columns, 3.4 * rows + 0.6, "", 1 + len(runs) // 8)
    axes = panels.subplots(rows, columns, squeeze=False).flatten()
    for axis, (kind, name) in zip(axes, wanted, strict=False):
        for colour, run_name in zip(COLOURS * len(runs), runs, strict=False):
            _draw(axis, runs, run_name, kind, name, {"color": colour, "label": run_name})
        title = f"{kind} {name}".strip().replace("_", " ")
        axis.set_title(f"{title[:-1]} at each level" if name[-1:] == "/" else title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[len(wanted) :]:
        axis.set_visible(False)
    add_legend(figure)
    return figure


def plot_validation_loss(losses: Mapping[int, Mapping[str, float | None]]) -> Figure:
    """The validation loss over the steps, and at each noise level at the first and last of them;
    ``losses`` by step, then by name: "raw", "ema", "raw/log_snr_X", ..."""
    steps = sorted(losses)
    figure, panels = canvas(10, 4, "loss of samples that were kept apart")
    left, right = panels.subplots(1, 2)
    for colour, weights in zip(COLOURS, ("raw", "ema"), strict=False):
        values = [losses[step].get(weights) for step in steps]
        if values[-1] is None:
            continue
        left.plot(steps, np.array(values, dtype=float), color=colour, label=weights, marker=".")
        for step, line in {steps[0]: ":", steps[-1]: "-"}.items():
            at = _by_level(losses[step], f"{weights}/")
            label = f"{weights}, step {step}"
            right.plot([*at], [*at.values()], line, color=colour, label=label, marker=".")
    left.set(xlabel="optimizer step", ylabel="mean squared error, unweighted")
    right.set(xlabel=LOG_SNR)
    add_legend(figure)
    return figure


def _by_level(values: Mapping[str, float | None], name: str) -> dict[float, float]:
    """The losses called ``name`` by log-SNR."""
    prefix = f"{name}{_AT}"
    found = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    return dict(sorted((float(at), v) for at, v in found.items() if v is not None))


def _panels(runs: Mapping[str, RecordedRun]) -> list[tuple[str, str]]:
    """Kind and name of what is drawn, the name ending in "/" where it is a loss by noise level."""
    found: dict[tuple[str, str], None] = {}
    for kind in kinds(runs):
        values = [m for run in runs.values() for m in run.metrics.get(kind, {}).values()]
        names = dict.fromkeys(name for each in values for name in each)
        found |= dict.fromkeys((kind, name) for name in names if _AT not in name)
        found |= dict.fromkeys((kind, name.partition(_AT)[0]) for name in names if _AT in name)
    if any(run.losses for run in runs.values()):
        found["training loss, second half", ""] = None
    return [*found]


def _draw(
    axis: Axes, runs: Mapping[str, RecordedRun], own: str, kind: str, name: str, style: dict
) -> None:
    run = runs[own]
    if not name:
        axis.set(xlabel=LOG_SNR)
        if run.losses:
            values = np.asarray(run.losses["second_half"], dtype=float)
            axis.stairs(values, run.losses["edges"], baseline=None, linewidth=1.6, **style)
        return
    if name.endswith("/"):
        at = _by_level(at_compared_step(runs, kind)[own], name)
        axis.plot([*at], [*at.values()], marker=".", **style)
        axis.set(xlabel=LOG_SNR)
        return
    values = {step: m[name] for step, m in sorted(run.metrics.get(kind, {}).items()) if name in m}
    axis.plot([*values], [*values.values()], marker=".", **style)
    axis.set(xlabel="optimizer step")
