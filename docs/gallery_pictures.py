"""One small picture for each entry of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffusers_curriculum.analysis.over_training import over_training
from diffusers_curriculum.analysis.plots import BLUE, GREY, ORANGE, figure_to_image
from diffusers_curriculum.analysis.preview import log_snr_histogram
from diffusers_curriculum.catalogue import Entry
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.weighting import log_weight
from diffusers_curriculum.weighting.learned import LearnedLossWeights

STEPS = 1000
SIZE, DPI = (4.2, 2.6), 90
_TARGETS = {"epsilon": BLUE, "v_prediction": ORANGE, "flow": "#3a9d5d", "sample": "#7a5aa6"}
# How each sampler is built for its picture, by the name of its entry.
SAMPLER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "curriculum": {"clusters": 10, "pacing": "fixed", "pacing_args": {"stage_steps": 50}},
    "density": {"density": "laplace"},
    "gradient_norm": {"mode": "loss"},
    "moving": {"move_steps": 400, "widen_steps": 500},
    "per_source": {"laws": [{"density": "uniform"}, {"density": "laplace"}], "of_source": [0, 1]},
    "sequence": {
        "phases": [
            {"until": 600, "sampler": {"density": "normal", "density_args": {"mean": -1.6}}},
            {"until": None, "sampler": {"density": "uniform"}},
        ]
    },
}


def density_picture(entry: Entry, arguments: Mapping[str, Any]) -> Image.Image:
    """The density per unit of log-SNR as it is drawn on a schedule of its family, beside that of
    uniform timesteps."""
    sampler = DensityTimestepSampler.from_scheduler(
        _scheduler(entry.families),
        density=entry.name,
        density_args=dict(arguments),
        floor=0.0 if entry.name == "uniform" else 1e-9,  # as good as none, and no warning of it
    )
    figure, axis = _canvas(entry.name)
    _draw_law(axis, sampler.levels, sampler.probabilities())
    return _image(figure)


def weighting_picture(entry: Entry, arguments: Mapping[str, Any]) -> Image.Image:
    """The weight on each target that the weighting knows, relative to its largest."""
    levels = NoiseLevels.from_scheduler(diffusers.DDPMScheduler())  # type: ignore[call-arg]
    if entry.make is LearnedLossWeights:
        return _learned_picture(levels)
    figure, axis = _canvas(f"{entry.name}: weight on ...")
    targets = (
        ("flow", "sample") if entry.families == "flow" else ("epsilon", "v_prediction", "flow")
    )
    for target in targets:
        try:
            log = log_weight(entry.name, levels.log_snr, target, **arguments)
        except ValueError:
            continue  # a variant that is defined for some targets only
        weight = (log - log.max()).exp().numpy()
        axis.plot(levels.log_snr.numpy(), weight, color=_TARGETS[target], label=target)
    axis.set(yscale="log", ylim=(1e-3, 1.6))
    above: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
    axis.legend(fontsize=7, frameon=False, **above)
    axis.set_title(axis.get_title(), fontsize=9, pad=18)
    return _image(figure)


def _learned_picture(levels: NoiseLevels) -> Image.Image:
    """The weights once the losses of a made-up model were seen, and these losses."""
    learned, means = LearnedLossWeights(levels, learning_rate=0.05), _linear_losses(levels)
    scatter = np.random.Generator(np.random.Philox(key=1))
    for _ in range(STEPS):
        indices = torch.from_numpy(scatter.integers(len(levels), size=128))
        factors = torch.from_numpy(scatter.gamma(4.0, 0.25, size=128))
        learned.observe(indices, means[indices] * factors)
    figure, axis = _canvas("uncertainty: weight, and loss (dotted)")
    weight = learned.weights(STEPS)
    axis.plot(levels.log_snr, weight / weight.max(), color=BLUE)
    axis.plot(levels.log_snr, means, color=ORANGE, linestyle=":")
    axis.set(yscale="log", ylim=(1e-3, 1.6))
    return _image(figure)


def sampler_picture(entry: Entry, arguments: Mapping[str, Any]) -> Image.Image:
    """What is drawn over training; for a sampler that learns, its law once it has seen the losses
    of a made-up model."""
    given = SAMPLER_ARGUMENTS.get(entry.name, {}) | dict(arguments)
    sampler = entry.make.from_scheduler(_scheduler(entry.families), **given)  # type: ignore[attr-defined]
    figure, axis = _canvas(entry.name)
    if sampler.learns:
        loss = _train(sampler)
        _draw_law(axis, sampler.levels, sampler.probabilities())
        right = axis.twinx()
        right.plot(sampler.levels.log_snr, loss, color=ORANGE, linestyle=":")
        right.set_ylabel("loss (dotted)", fontsize=7)
        right.set_ylim(bottom=0)
        right.tick_params(labelsize=7)
    else:
        _draw_training(axis, sampler)
    return _image(figure)


def _scheduler(families: str) -> Any:
    """A schedule that an entry is meant for."""
    if "vp" in families or families == "all":
        return diffusers.DDPMScheduler(  # type: ignore[call-arg]
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
    if "flow" in families:
        return diffusers.FlowMatchEulerDiscreteScheduler()  # type: ignore[call-arg]
    return diffusers.EDMEulerScheduler()  # type: ignore[call-arg]


def _draw_law(axis: Axes, levels: NoiseLevels, mass: Tensor) -> None:
    uniform = torch.full_like(mass, 1 / len(mass))
    edges, (drawn, plain) = log_snr_histogram(levels, torch.stack([mass, uniform]).numpy(), 120)
    axis.stairs(drawn, edges, color=BLUE, fill=True, alpha=0.25)
    axis.stairs(drawn, edges, color=BLUE, linewidth=1.6, baseline=None)
    axis.stairs(plain, edges, color=GREY, linestyle="--", baseline=None)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("per unit of log-SNR", fontsize=7)


def _draw_training(axis: Axes, sampler: TimestepSampler) -> None:
    training = over_training(sampler, STEPS)
    edges, density = log_snr_histogram(sampler.levels, training.masses)
    times = np.append(training.starts, training.steps)
    shown = np.ma.masked_less(density.T, 1e-9)
    axis.pcolormesh(times, edges, shown, norm=PowerNorm(0.5, vmin=0), shading="flat")
    axis.set_facecolor("#e4e4e4")
    axis.set_xlabel("optimizer step", fontsize=7)
    axis.set_ylabel("log-SNR", fontsize=7)


def _train(sampler: TimestepSampler, batch: int = 128) -> np.ndarray:
    """Let ``sampler`` see mean losses with the scatter of single samples; returns the means."""
    means = _linear_losses(sampler.levels)
    scatter = np.random.Generator(np.random.Philox(key=1))
    for step in range(sampler.config["warm_up"] + 4 * sampler.config["refresh_every"] + 1):
        indices = sampler.sample(batch, step=step).indices
        factors = torch.from_numpy(scatter.gamma(4.0, 0.25, size=batch))
        sampler.observe(indices, means[indices] * factors, step)
    return means.numpy()


def _linear_losses(levels: NoiseLevels) -> Tensor:
    """(T,) mean losses of a linear model of epsilon on data whose variances spread over four
    decades."""
    snr = levels.log_snr.exp()[:, None]
    variances = torch.logspace(-3, 1, 9, dtype=torch.float64)
    return (snr * variances / (1 + snr * variances)).mean(1)


def _canvas(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("log-SNR (higher = cleaner)", fontsize=7)
    axis.tick_params(labelsize=7)
    return figure, axis


def _image(figure: Figure) -> Image.Image:
    return figure_to_image(figure)
