"""Pictures: which noise levels a run trains on, and its loss at each of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import CurriculumTimestepSampler, TimestepSampler

_BLUE, _ORANGE, _GREY = "#2a6fbb", "#d9731a", "#8a8a8a"


def plot_timesteps(
    sampler: TimestepSampler, weights: Tensor | None = None, max_train_steps: int | None = None
) -> Figure:
    """Draw what ``sampler`` trains on: its density over log-SNR and over timesteps, the effective
    density (mass x loss weight x importance), and over training.

    Args:
        weights: (T,) loss weights, or None for an unweighted loss.
        max_train_steps: length of the run, for the picture over training.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    levels, mass = sampler.levels, final_probabilities(sampler)
    uniform = torch.full_like(mass, 1 / len(mass))
    _draw_density(axes[0, 0], levels, {"drawn": mass, "uniform timesteps": uniform})
    axes[0, 0].set_title("density of the drawn log-SNR, everything open")
    _draw_mass(axes[0, 1], mass, uniform)
    effective = effective_density(sampler, mass, weights)
    _draw_density(axes[1, 0], levels, {"mass x weight": effective, "uniform timesteps": uniform})
    axes[1, 0].set_title("effective density: mass x loss weight x importance")
    _draw_training(axes[1, 1], sampler, max_train_steps)
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
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for colour, (name, values) in zip((_ORANGE, _BLUE, _GREY), losses.items(), strict=False):
        axis.stairs(np.asarray(values), edges, baseline=None, color=colour, label=name, linewidth=2)
    axis.set(xlabel="log-SNR (higher = cleaner)", ylabel="mean squared error, unweighted")
    axis.legend(loc="upper center")
    right = axis.twinx()
    right.stairs(np.asarray(counts), edges, color=_GREY, alpha=0.25, fill=True)
    right.set_ylabel("samples drawn (grey)")
    axis.set_zorder(right.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.set_title("loss per noise level")
    return figure


def final_probabilities(sampler: TimestepSampler) -> Tensor:
    """(T,) the mass once every cluster is open."""
    if isinstance(sampler, CurriculumTimestepSampler) and sampler.base.static_law:
        return sampler.stage_probabilities()[-1]
    return sampler.probabilities()


def effective_density(sampler: TimestepSampler, mass: Tensor, weights: Tensor | None) -> Tensor:
    """(T,) mass x weight x importance, normalised: the objective that is really minimised."""
    base = sampler.base if isinstance(sampler, CurriculumTimestepSampler) else sampler
    effective = mass * base.importance() * (1.0 if weights is None else weights.double())
    return effective / effective.sum()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write ``figure`` to ``path``; its ending chooses the format (png, svg, pdf)."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    figure.savefig(path, dpi=110)


def figure_to_image(figure: Figure) -> Image.Image:
    """The figure as a PIL image, for trackers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_density(axis: Axes, levels: NoiseLevels, masses: Mapping[str, Tensor]) -> None:
    finite = levels.edges.isfinite()
    cells = finite[:-1] & finite[1:]
    edges = levels.edges[:-1][cells], levels.edges[1:][cells]
    for (name, mass), colour in zip(masses.items(), (_BLUE, _GREY), strict=True):
        density = mass[cells] / (edges[0] - edges[1])
        axis.plot((edges[0] + edges[1]) / 2, density, color=colour, label=name)
    axis.set(xlabel="log-SNR (higher = cleaner)", ylabel="per unit of log-SNR")
    axis.set_ylim(bottom=0)
    axis.legend()


def _draw_mass(axis: Axes, mass: Tensor, uniform: Tensor) -> None:
    axis.plot(mass, color=_BLUE, label="drawn")
    axis.plot(uniform, color=_GREY, label="uniform timesteps")
    axis.set(xlabel="timestep index (0 = cleanest)", ylabel="probability")
    axis.set_ylim(bottom=0)
    axis.set_title("probability of each timestep, everything open")
    axis.legend()


def _draw_training(axis: Axes, sampler: TimestepSampler, max_train_steps: int | None) -> None:
    axis.set(xlabel="optimizer step", ylabel="log-SNR")
    steps = max_train_steps or 1000
    rows, starts, how = _over_training(sampler, steps)
    axis.set_title(f"density over training{how}")
    edges, histogram = _log_snr_histogram(sampler.levels, rows)
    times = np.append(starts, steps)
    mesh = axis.pcolormesh(times, edges, histogram.T, cmap="viridis", shading="flat")
    axis.figure.colorbar(mesh, ax=axis, label="per unit of log-SNR")


def _over_training(sampler: TimestepSampler, steps: int) -> tuple[Tensor, np.ndarray, str]:
    """Masses (n, T), the steps (n,) from which each holds, and how the steps are known."""
    if not (isinstance(sampler, CurriculumTimestepSampler) and sampler.base.static_law):
        return sampler.probabilities()[None], np.zeros(1), ""
    if int(sampler.cluster_counts.sum()):
        starts, how = sampler.opened_at.double().numpy(), " (stages as they opened)"
    else:
        starts, how = _planned_starts(sampler, steps), " (stages as planned)"
        if sampler.pacing.name == "patience":
            how = " (stages as on a loss plateau)"
    # stages that open at one step leave the last of them
    shown = (starts >= 0) & (starts < steps) & np.append(starts[1:] != starts[:-1], True)
    return sampler.stage_probabilities()[torch.from_numpy(shown)], starts[shown], how


def _planned_starts(sampler: CurriculumTimestepSampler, steps: int) -> np.ndarray:
    """(stages,) the step at which each stage is expected to begin."""
    stages = range(1, sampler.stages + 1)
    if sampler.pacing.name in ("patience", "fixed"):
        return np.array([sampler.pacing.expected_steps(n) for n in stages], dtype=float)
    reached = [int(sampler.pacing.stage({}, s, sampler.stages)) for s in range(steps + 1)]
    return np.searchsorted(reached, list(stages)).astype(float)


def _log_snr_histogram(levels: NoiseLevels, masses: Tensor, bins: int = 80) -> tuple[Any, Any]:
    """Edges (bins + 1,) and densities (n, bins); each level's mass is spread over its cell, as the
    levels of the clean end lie further apart than the bins."""
    cells = levels.edges.flip(0).numpy()
    finite = cells[np.isfinite(cells)]
    edges = np.linspace(finite[0], finite[-1], bins + 1)
    below = np.pad(masses.flip(1).numpy().cumsum(1), ((0, 0), (1, 0)))
    below = np.stack([np.interp(edges, cells.clip(edges[0], edges[-1]), row) for row in below])
    below[:, 0], below[:, -1] = 0, masses.sum(1)  # a level at infinity counts to the end bin
    return edges, np.diff(below) / (edges[1] - edges[0])
