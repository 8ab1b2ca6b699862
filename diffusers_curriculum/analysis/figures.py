"""Plots of difficulty: small ones, that a telephone shows as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusers_curriculum.analysis.convergence import Curves
from diffusers_curriculum.analysis.difficulty import DataDifficulty, Difficulty, cluster_names
from diffusers_curriculum.analysis.gradients import Gradients
from diffusers_curriculum.analysis.plots import COLOURS, GREY, LOG_SNR
from diffusers_curriculum.analysis.probes import Probe
from diffusers_curriculum.analysis.relative_entropy import Estimate
from diffusers_curriculum.analysis.score_rate import ScoreRate

_SIZE = (5.0, 3.3)
_KINDS = {
    "finite": "these samples as a finite set",
    "gaussian": "a Gaussian of their covariance",
    "bound": "the most there can be",
}


def entropy_figure(data: DataDifficulty) -> Figure:
    """K of the steps that end at each level of the grid."""
    figure, axis = _figure("K: relative entropy of one step", "nats")
    at = data.grid.log_snr.numpy()
    _kinds(axis, at, data.entropy)
    _logarithmic(axis)
    return _done(figure, axis)


def rate_figure(data: DataDifficulty, network: ScoreRate | None, at: np.ndarray) -> Figure:
    """J, of the data and of a network."""
    figure, axis = _figure("J: rate for equal steps of log-SNR", "nats per squared unit of log-SNR")
    _kinds(axis, data.grid.log_snr.numpy(), data.rate)
    if network is not None:
        _line(axis, at, network.rate, "what the network knows", COLOURS[3])
    _logarithmic(axis)
    return _done(figure, axis)


def error_figure(probes: Mapping[str, Probe]) -> Figure:
    """Errors in units of v, with those of the best linear predictor."""
    figure, axis = _figure("unweighted v error, (1 + S) x0 error", "mean squared error")
    for (name, probe), colour in zip(_some(probes), COLOURS, strict=False):
        _line(axis, probe.grid.log_snr.numpy(), probe.error("v"), name, colour)
    last = [*probes.values()][-1]
    linear = (last.linear * last.scale("v")).numpy()
    label = "best linear predictor"
    axis.plot(last.grid.log_snr.numpy(), linear, color=GREY, linestyle="--", label=label)
    return _done(figure, axis)


def relative_figure(probes: Mapping[str, Probe]) -> Figure:
    """Errors as parts of those of the best linear predictor."""
    figure, axis = _figure("error over that of the best linear predictor", "ratio")
    for (name, probe), colour in zip(_some(probes), COLOURS, strict=False):
        _line(axis, probe.grid.log_snr.numpy(), probe.relative, name, colour)
    axis.axhline(1, color=GREY, linestyle="--")
    return _done(figure, axis)


def information_figure(probe: Probe) -> Figure:
    """The rate of information, and its sum from the noisy end."""
    figure, axis = _figure("information to explain", "nats per dimension and unit of log-SNR")
    at = probe.grid.log_snr.numpy()
    _line(axis, at, probe.information_rate, "rate", COLOURS[0])
    right = axis.twinx()
    right.plot(at, probe.information.numpy(), color=COLOURS[1], label="sum from the noisy end")
    right.set_ylabel("nats per dimension", color=COLOURS[1], fontsize=8)
    right.tick_params(labelsize=8)
    return _done(figure, axis, right)


def progress_figure(probes: Mapping[str, Probe]) -> Figure:
    """How much each checkpoint is better than the one before, in units of v."""
    figure, axis = _figure("decrease of the v error since the checkpoint before", "v error")
    pairs = [(name, probe, before) for (_, before), (name, probe) in pairwise(probes.items())]
    for (name, later, earlier), colour in zip(pairs[-len(COLOURS) :], COLOURS, strict=False):
        _line(axis, later.grid.log_snr.numpy(), later.progress_since(earlier), name, colour)
    axis.axhline(0, color=GREY, linewidth=0.8)
    return _done(figure, axis)


def gradient_figure(gradients: Gradients) -> Figure:
    """Root of the mean squared gradient, the mean gradient and its spread."""
    figure, axis = _figure("gradient of the network's own loss", "norm")
    at = gradients.grid.log_snr.numpy()
    mean = gradients.squared_norm.clamp_min(0).sqrt().numpy()
    axis.plot(at, gradients.second_moment.value.sqrt().numpy(), label="of single samples (rms)")
    axis.plot(at, gradients.variance.clamp_min(0).sqrt().numpy(), label="their spread")
    axis.plot(at, np.where(mean > 0, mean, np.nan), label="of the mean", linestyle="--")
    _logarithmic(axis)
    return _done(figure, axis)


def affinity_figure(gradients: Gradients) -> Figure:
    """Cosines between the mean gradients of clusters, as a table of colours."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axis = figure.subplots()
    table = gradients.affinity.numpy()
    names = cluster_names(gradients.grid, gradients.groups)
    axis.imshow(table, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        text = "?" if np.isnan(value) else f"{value:.2f}"
        dark = not np.isnan(value) and abs(value) > 0.6
        axis.text(
            column, row, text, ha="center", va="center", fontsize=8, color="w" if dark else "k"
        )
    axis.set_xticks(range(len(names)), names, fontsize=7, rotation=30)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_title("cosine between gradients of clusters of log-SNR", fontsize=9)
    return figure


def convergence_figure(name: str, curves: Curves) -> Figure:
    """Share of the fall that is still to come, for each cluster."""
    figure, axis = _figure(f"still to learn: {name}", "share of the fall of the loss")
    for cluster, column in zip(curves.clusters, curves.remaining.T.numpy(), strict=True):
        axis.plot(curves.steps, column, label=f"log-SNR {cluster}")
    axis.set(xlabel="optimizer step")
    axis.axhline(0.1, color=GREY, linestyle="--", linewidth=0.8)
    axis.set_ylim(-0.05, 1.3)
    return _done(figure, axis)


def law_figure(difficulty: Difficulty) -> Figure:
    """Densities of the suggested laws, with that of uniform timesteps."""
    figure, axis = _figure("laws to try", "draws per unit of log-SNR")
    levels = difficulty.data.grid.levels
    width = -levels.edges.diff().numpy()
    shown = np.isfinite(width)
    at = levels.log_snr.numpy()[shown]
    density = np.where(shown, 1 / len(width) / np.where(shown, width, 1), 0)[shown]
    axis.plot(at, density, color=GREY, linestyle="--", label="uniform timesteps")
    laws = [each for each in difficulty.suggestions if each.name.endswith("_laplace")]
    for each, colour in zip(laws, COLOURS, strict=False):
        mass = each.sampler.probabilities().numpy()[shown] / width[shown]
        axis.plot(at, mass, color=colour, label=each.name)
    axis.set_ylim(bottom=0)
    return _done(figure, axis)


def _figure(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(LOG_SNR, fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.set_prop_cycle(color=COLOURS)
    return figure, axis


def _done(figure: Figure, *axes: Axes) -> Figure:
    """With one legend below all, where no curve runs."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    columns = 2 if len(found) > 1 else 1
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=7
    )
    return figure


def _line(axis: Axes, at: np.ndarray, estimate: Estimate, label: str, colour: str) -> None:
    """A curve with a band of two standard errors."""
    value, error = estimate.value.numpy(), 2 * estimate.error.numpy()
    axis.plot(at, value, color=colour, label=label, linewidth=1.6)
    if error.any():
        axis.fill_between(at, value - error, value + error, color=colour, alpha=0.2, linewidth=0)


def _kinds(axis: Axes, at: np.ndarray, estimates: Mapping[str, Estimate]) -> None:
    for (kind, label), colour in zip(_KINDS.items(), COLOURS, strict=False):
        _line(axis, at, estimates[kind], label, GREY if kind == "bound" else colour)


def _logarithmic(axis: Axes) -> None:
    """A scale over at most eight powers of ten, as what is smaller is rounding."""
    values: Iterable[Sequence[float]] = (line.get_ydata() for line in axis.lines)  # type: ignore[misc]
    all_values = np.concatenate([np.asarray(v, dtype=float) for v in values])
    positive = all_values[np.isfinite(all_values) & (all_values > 0)]
    axis.set_yscale("log")
    if len(positive):
        axis.set_ylim(max(positive.min() / 2, positive.max() * 1e-8), positive.max() * 2)


def _some(probes: Mapping[str, Probe]) -> list[tuple[str, Probe]]:
    """The last probes, as many as there are colours."""
    return [*probes.items()][-len(COLOURS) :]
