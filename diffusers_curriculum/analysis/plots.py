"""Pictures: which noise levels a run trains on, and its loss at each of them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor

from diffusers_curriculum.analysis.preview import Preview, check_comparable, make_preview
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import TimestepSampler

BLUE, ORANGE, GREY, LIGHT = "#2a6fbb", "#d9731a", "#8a8a8a", "#a9cbea"
# distinct in print and to colour-blind readers (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_OVER_TIME = ("#cc79a7", "#e69f00", "#009e73", "#56b4e9")  # of laws before the last one
_UNIFORM = "uniform timesteps"
_STYLES: dict[str, dict[str, Any]] = {
    _UNIFORM: {"color": GREY, "linewidth": 1.2, "linestyle": "--"},
    "drawn": {"color": BLUE, "linewidth": 2.0},
    "drawn x weight": {"color": ORANGE, "linewidth": 1.6},
}
LOG_SNR, _INDEX = "log-SNR (higher = cleaner)", "timestep index (0 = cleanest)"
_DENSITY, _RELATIVE = "per unit of log-SNR", "times the uniform share"


def plot_timesteps(
    sampler: TimestepSampler,
    weights: Tensor | None = None,
    max_train_steps: int | None = None,
    data_std: float | None = None,
) -> Figure:
    """Draw what ``sampler`` trains on in a run of ``max_train_steps`` under loss ``weights`` (T,);
    see :func:`preview.make_preview` and :func:`plot_preview`."""
    return plot_preview(make_preview(sampler, weights, max_train_steps, data_std=data_std))


def plot_preview(preview: Preview) -> Figure:
    """Four panels: density over log-SNR, draws of each timestep relative to uniform ones, the share
    of each cluster (or tenth of the schedule), and the density over training; warnings below."""
    title = textwrap.shorten(preview.title, 110, placeholder=" ...")
    where = textwrap.fill(preview.normalised, 120)
    figure, panels = canvas(11, 7.5, f"{title}\n{preview.schedule}\n{where}")
    axes = panels.subplots(2, 2)
    _draw_density(axes[0, 0], preview)
    _draw_relative(axes[0, 1], preview)
    _draw_shares(axes[1, 0], preview)
    _draw_training(axes[1, 1], preview)
    add_legend(figure)
    if preview.warnings:
        text = "\n".join(textwrap.fill(f"Warning: {w}", 185) for w in preview.warnings)
        figure.supxlabel(text, fontsize=8, color="#b00020", x=0.01, ha="left")
    return figure


def plot_comparison(previews: Mapping[str, Preview]) -> Figure:
    """Overlay what several samplers train on: density over log-SNR and draws of each timestep;
    where there are loss weights, a second row shows mass x weight. A ValueError comes from
    :func:`preview.check_comparable`."""
    check_comparable(previews)
    known = {name: preview.training.how for name, preview in previews.items()}
    previews = {f"{k} ({known[k]})" if known[k] else k: each for k, each in previews.items()}
    weighted = any(preview.weights is not None for preview in previews.values())
    schedule, columns = next(iter(previews.values())).schedule, _columns([*previews, _UNIFORM])
    rows = -(-(len(previews) + 1) // columns)
    figure, panels = canvas(11, 7.5 if weighted else 4.2, schedule, rows)
    axes = panels.subplots(1 + weighted, 2, squeeze=False)
    _overlay(axes[0], previews, "mass", "drawn")
    if weighted:
        _overlay(axes[1], previews, "effective", "drawn x weight")
    add_legend(figure)
    return figure


def plot_law(sampler: TimestepSampler, step: int) -> Figure:
    """Draw the densities over log-SNR that optimizer step ``step`` draws from: each law of the
    sampler, with what it will be once all is open."""
    figure, panels = canvas(8, 4, f"step {step}: {textwrap.shorten(sampler.describe(), 90)}")
    axis = panels.subplots()
    count = len(sampler.levels)
    uniform = density_line(sampler.levels, np.full(count, 1 / count))
    axis.plot(*uniform, label=_UNIFORM, **_STYLES[_UNIFORM])
    for colour, (name, law) in zip(COLOURS * count, sampler.laws.items(), strict=False):
        drawn, opened = law.probabilities(step).numpy(), law.at_stage(step=step)[0].numpy()
        label = f"drawn {name}".strip()
        if not np.array_equal(drawn, opened):
            style: dict[str, Any] = {"linestyle": ":", "label": f"{label}, all open"}
            axis.plot(*density_line(law.levels, opened), color=colour, **style)
        axis.plot(*density_line(law.levels, drawn), color=colour, linewidth=2.0, label=label)
    axis.set(xlabel=LOG_SNR, ylabel=_DENSITY)
    _from_zero(axis)
    add_legend(figure)
    return figure


def plot_loss_by_noise_level(
    edges: Sequence[float], losses: Mapping[str, Sequence[float]], counts: Sequence[float]
) -> Figure:
    """Draw the mean unweighted loss, and the number of samples, in each bin of log-SNR.

    Args:
        edges: (bins + 1,) increasing bin edges in log-SNR.
        losses: named (bins,) mean losses, NaN where a bin saw nothing.
        counts: (bins,) samples seen.
    """
    figure, panels = canvas(8, 5, "loss per noise level")
    axis = panels.subplots()
    for colour, (name, values) in zip((ORANGE, BLUE, GREY), losses.items(), strict=False):
        axis.stairs(np.asarray(values), edges, baseline=None, color=colour, label=name, linewidth=2)
    axis.set(xlabel=LOG_SNR, ylabel="mean squared error, unweighted")
    right = axis.twinx()
    right.stairs(np.asarray(counts), edges, color=GREY, alpha=0.25, fill=True)
    right.set_ylabel("samples drawn (grey)")
    axis.set_zorder(right.get_zorder() + 1)
    axis.patch.set_visible(False)
    add_legend(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write ``figure`` to ``path``; its ending chooses the format (png, svg, pdf)."""
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def figure_to_image(figure: Figure) -> Image.Image:
    """The figure as a PIL image, for trackers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def density_line(levels: NoiseLevels, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the cells of finite width, and the density of ``mass`` (T,) in them per unit of
    log-SNR."""
    edges = levels.edges.numpy()
    cells = np.isfinite(edges[:-1]) & np.isfinite(edges[1:])
    upper, lower = edges[:-1][cells], edges[1:][cells]
    return (upper + lower) / 2, mass[cells] / (upper - lower)


def canvas(width: float, height: float, title: str, rows: int = 1) -> tuple[Figure, SubFigure]:
    """A figure with a strip of ``rows`` lines for its legend, where no curve runs, and the part
    below it for the panels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    strip = 0.22 * rows
    parts: Any = figure.subfigures(2, 1, height_ratios=[strip, height - strip])
    return figure, parts[1]


def add_legend(figure: Figure) -> None:
    """Tell in the strip what all panels show, each name once."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found
    style: dict[str, Any] = {"loc": "center", "fontsize": 8, "frameon": False}
    figure.subfigs[0].legend(found.values(), found.keys(), ncols=_columns([*found]), **style)


def _columns(names: Sequence[str]) -> int:
    """How many of ``names`` fit beside each other in a legend."""
    return max(1, min(len(names), 160 // (max(map(len, names)) + 8)))


def _draw_density(axis: Axes, preview: Preview) -> None:
    for (step, mass), colour in zip(preview.training.course.items(), _OVER_TIME, strict=False):
        if not np.array_equal(mass, preview.mass):
            style = {"color": colour, "linewidth": 1.0, "label": f"drawn at step {step}"}
            axis.plot(*density_line(preview.levels, mass), **style)
    for name, mass in preview.laws.items():
        axis.plot(*density_line(preview.levels, mass), label=name, **_STYLES[name])
    ends = preview.quantiles["drawn"].log_snr[0], preview.quantiles["drawn"].log_snr[-1]
    if np.isfinite(ends).all():
        axis.axvspan(*ends, color=BLUE, alpha=0.08, label="90 % of the draws")
    at_end = "" if len(preview.training.starts) == 1 else ", at the end of the run"
    at_infinity = float(preview.mass[~preview.levels.finite.numpy()].sum())
    beyond = f"\n(and {at_infinity:.2g} of the draws at infinite log-SNR)" if at_infinity else ""
    axis.set(xlabel=LOG_SNR, ylabel=_DENSITY, title=f"density over log-SNR{at_end}{beyond}")
    _from_zero(axis)


def _draw_relative(axis: Axes, preview: Preview) -> None:
    for name, mass in preview.laws.items():
        axis.plot(mass * len(mass), label=name, **_STYLES[name])
    axis.set(xlabel=_INDEX, ylabel=_RELATIVE, title="how often each timestep is trained")
    _from_zero(axis)


def _draw_shares(axis: Axes, preview: Preview) -> None:
    shares = preview.shares[::-1]
    columns = {"drawn": (BLUE, "drawn")}
    if "drawn x weight" in preview.laws:
        columns["drawn x weight"] = (ORANGE, "effective")
    if len(preview.training.starts) > 1:
        columns = {"drawn, mean over the run": (LIGHT, "over_run")} | columns
    place, width = np.arange(len(shares)), 0.8 / len(columns)
    for number, (name, (colour, field)) in enumerate(columns.items()):
        heights = [100 * getattr(share, field) for share in shares]
        offset = (number - (len(columns) - 1) / 2) * width
        axis.bar(place + offset, heights, width, color=colour, label=name)
    uniform, edges = [100 * share.uniform for share in shares], np.arange(len(shares) + 1) - 0.5
    style: dict[str, Any] = {"color": GREY, "linestyle": "--", "label": _UNIFORM}
    axis.stairs(np.array(uniform), edges, baseline=None, **style)
    every = max(1, len(shares) // 10)
    ticks = [f"{share.log_snr_low:.1f}" for share in shares]
    axis.set_xticks(place[::every], ticks[::every], fontsize=8)
    group = "cluster" if preview.grouped_by == "cluster" else "tenth of the schedule"
    axis.set(xlabel=f"lowest log-SNR of each {group}", ylabel="%")
    axis.set_title(f"share of each {group}, noisiest first")
    _from_zero(axis)


def _draw_training(axis: Axes, preview: Preview) -> None:
    training, (edges, density) = preview.training, preview.by_log_snr
    times = np.append(training.starts, training.steps)
    closed = np.ma.masked_less(density.T, 1e-9)
    # the root shows the tails, which the peak would leave black
    mesh = axis.pcolormesh(times, edges, closed, norm=PowerNorm(0.5, vmin=0), shading="flat")
    axis.set_facecolor("#e4e4e4")
    axis.figure.colorbar(mesh, ax=axis, label=_DENSITY)
    how = f" ({training.how})" if training.how else ""
    axis.set(xlabel="optimizer step (grey: not drawn)", ylabel="log-SNR")
    axis.set_title(f"density over training{how}")


def _overlay(axes: np.ndarray, previews: Mapping[str, Preview], field: str, what: str) -> None:
    left, right = axes
    first = next(iter(previews.values()))
    left.plot(*density_line(first.levels, first.uniform), color=GREY, linestyle="--", linewidth=1)
    right.axhline(1, color=GREY, linestyle="--", linewidth=1, label=_UNIFORM)
    for (name, preview), colour in zip(previews.items(), COLOURS, strict=False):
        mass, style = getattr(preview, field), {"color": colour, "label": name, "linewidth": 1.8}
        left.plot(*density_line(preview.levels, mass), **style)
        right.plot(mass * len(mass), **style)
    left.set(xlabel=LOG_SNR, ylabel=_DENSITY, title=f"{what}: density over log-SNR")
    right.set(xlabel=_INDEX, ylabel=_RELATIVE, title=f"{what}: each timestep")
    _from_zero(left)
    _from_zero(right)


def _from_zero(axis: Axes) -> None:
    axis.set_ylim(bottom=0)
    axis.margins(x=0.01)
