"""Inference schedules that visit the noise levels a law trained, for diffusers' own schedulers."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffusers_curriculum.checks import inside, whole
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import TimestepSampler

logger = logging.getLogger(__name__)

# A level that gets less than this much of its share under uniform timesteps is hardly trained.
HARDLY_TRAINED = 0.05
# Share of signal from which a state is not pure noise any more.
_SIGNAL = 0.02


@dataclass(frozen=True, eq=False)
class InferenceSpacing:
    """A scheduler, and the schedule to run it with: ``pipeline.scheduler = fit.scheduler``, then
    ``pipeline(..., **fit.arguments)``, or ``fit.scheduler.set_timesteps(**fit.arguments)``.

    Attributes:
        scheduler: an ordinary one of diffusers, ``set_timesteps`` already called.
        arguments: ``{"timesteps": [...]}`` or ``{"sigmas": [...]}``.
        indices: (N,) int64 levels visited, noisiest first; 0 = cleanest.
        log_snr: (N,) float64 of these.
    """

    scheduler: Any
    arguments: dict[str, list[float]]
    indices: Tensor
    log_snr: Tensor


def fit_inference(
    scheduler: Any,
    sampler: TimestepSampler,
    steps: int,
    *,
    cover: float = 0.5,
    mass: Tensor | None = None,
) -> InferenceSpacing:
    """A schedule of ``steps`` levels that follows what ``sampler`` draws, see :func:`law_indices`.

    A level that gets less than ``HARDLY_TRAINED`` of its uniform share is never visited, nor is one
    without any signal by a model that predicts epsilon. For what was trained without a floor: a
    network that is good at every level samples better on its scheduler's own levels
    (docs/differences.md, ``python -m benchmarks.inference_spacing``).

    DDIM takes no custom timesteps: its step assumes equal spacing. First-order DPM-Solver++ is the
    same update for any spacing (arXiv 2211.01095, section 4), and is what comes back for it.

    Args:
        scheduler: DDIM, or any scheduler whose ``set_timesteps`` takes ``timesteps`` (Euler,
            DPM-Solver++, ...), or FlowMatchEuler without dynamic shifting.
        sampler: on a schedule with the same noise levels.
        steps: number of levels visited.
        cover: share of the steps spread evenly over log-SNR. The default is this library's: with
            the law alone, the few steps in its tails are too long for a solver.
        mass: (T,) what was trained, for example the mean over a run; default what the sampler
            draws from now, for a curriculum its base.

    Raises:
        ValueError: ``cover`` out of range, other noise levels, more steps than trained levels, or a
            scheduler that does not take such a schedule (the message says which do).
    """
    levels = NoiseLevels.from_scheduler(scheduler)
    mine, trained = (each.log_snr.clamp(-15, 15) for each in (levels, sampler.levels))
    if len(mine) != len(trained) or not torch.allclose(mine, trained, atol=1e-3):
        raise ValueError(
            "the scheduler has other noise levels than the sampler was made for: make it with "
            "from_config(training_scheduler.config)."
        )
    if mass is None:
        mass = sampler.opened.probabilities()
    indices = law_indices(sampler.levels, mass, steps, cover=cover)
    _warn_of_signal(float(levels.log_snr[indices[0]]))
    runner = _runner(scheduler)
    arguments = _arguments(runner, levels, indices)
    runner.set_timesteps(**arguments)
    wanted = levels.timesteps[indices].double()
    if not torch.allclose(runner.timesteps.double(), wanted, rtol=1e-4, atol=1e-3):
        raise ValueError(
            f"{type(scheduler).__name__} changes the timesteps it is given: turn off its karras, "
            "exponential, beta or terminal options, which make a spacing of their own."
        )
    return InferenceSpacing(runner, arguments, indices, levels.log_snr[indices])


def law_indices(levels: NoiseLevels, mass: Tensor, steps: int, *, cover: float = 0.0) -> Tensor:
    """(steps,) int64 different levels at quantiles of ``(1 - cover) mass + cover even``, noisiest
    first: of ``mass`` (T,) and of a law uniform in log-SNR, both on the levels that are trained.

    The quantiles are (i + 1/2) / N for ``cover`` = 0, else i / (N - 1), so that the noisiest and
    the cleanest trained level are visited: pipelines start from pure noise and end at data.

    Raises:
        ValueError: ``cover`` outside [0, 1], or more steps than trained levels.
    """
    inside("cover", cover, 0, 1)
    trained = (mass * len(mass) >= HARDLY_TRAINED) & (
        (levels.alpha > 0) | (levels.prediction_type != "epsilon")
    )
    places = trained.nonzero().flatten()
    whole("steps", steps, 1)
    if steps > len(places):
        raise ValueError(
            f"steps={steps} is more than the {len(places)} levels that are trained: ask for fewer, "
            "or train with a larger floor."
        )
    widths = -levels.edges.diff()[places]
    even = torch.where(widths.isfinite(), widths, 0.0)
    law = (1 - cover) * mass[places] / mass[places].sum() + cover * even / even.sum()
    rank = torch.arange(steps)
    at = rank.double()
    quantiles = at / max(1, steps - 1) if cover else (at + 0.5) / steps
    cdf, last = law.cumsum(0) / law.sum(), len(law) - 1
    found = torch.searchsorted(cdf, quantiles.clamp_max(1 - 1e-12)).clamp_max(last)
    # neighbours in place of repetitions
    found = (found - rank).cummax(0).values + rank
    return places[torch.minimum(found, len(law) - steps + rank)].flip(0)


def visited_indices(scheduler: Any, levels: NoiseLevels, steps: int) -> Tensor:
    """(N,) int64 the levels nearest to what ``scheduler`` visits in ``steps`` steps, increasing.

    Raises:
        ValueError: what its ``set_timesteps`` raises, for example for want of ``mu``.
    """
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(steps)
    table, visited = levels.timesteps.double(), copy.timesteps.double().cpu()
    middles = (table[1:] + table[:-1]) / 2
    return torch.searchsorted(middles.contiguous(), visited.contiguous()).unique()


def trained_share(mass: Tensor, visited: Tensor) -> Tensor:
    """(N,) the ``mass`` (T,) of the levels nearest to each of ``visited`` (N,), increasing indices,
    relative to uniform timesteps."""
    middles = (visited[1:] + visited[:-1] + 1) // 2
    group = torch.searchsorted(middles, torch.arange(len(mass)), right=True)
    total = torch.zeros(len(visited), dtype=mass.dtype).index_add(0, group, mass)
    return total * len(mass) / torch.bincount(group, minlength=len(visited))


def _warn_of_signal(log_snr: float) -> None:
    signal = 1 / (1 + math.exp(-log_snr))
    if signal > _SIGNAL:
        logger.warning(
            "inference starts at log-SNR %.2f, where %.0f %% of the state's power is signal, but "
            "pipelines start from pure noise: train with a floor, so that noisier levels can be "
            "visited, and keep cover above 0.",
            log_snr,
            100 * signal,
        )


def _runner(scheduler: Any) -> Any:
    """A fresh scheduler that takes custom timesteps: a copy, or DDIM's twin."""
    if not isinstance(scheduler, diffusers.DDIMScheduler):
        return type(scheduler).from_config(scheduler.config)
    if scheduler.config["clip_sample"]:
        raise ValueError(
            "this DDIM scheduler clips its samples (clip_sample=True), which its twin that takes "
            "custom timesteps cannot: pass one with clip_sample=False, or an Euler scheduler."
        )
    last = "zero" if scheduler.config["set_alpha_to_one"] else "sigma_min"
    twin: Any = diffusers.DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", solver_order=1, final_sigmas_type=last
    )
    return twin


def _arguments(scheduler: Any, levels: NoiseLevels, indices: Tensor) -> dict[str, list[float]]:
    """The schedule in the words of this scheduler's ``set_timesteps``."""
    name, takes = type(scheduler).__name__, inspect.signature(scheduler.set_timesteps).parameters
    if levels.family == "vp" and "timesteps" in takes:
        return {"timesteps": levels.timesteps[indices].tolist()}
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        if scheduler.config["use_dynamic_shifting"]:
            raise ValueError(
                f"{name} with use_dynamic_shifting moves every schedule by the image size: pass "
                "one with a fixed shift."
            )
        # it shifts what it is given, and the table is shifted already
        sigma, shift = levels.sigma[indices], float(scheduler.shift)
        return {"sigmas": (sigma / (shift - (shift - 1) * sigma)).tolist()}
    raise ValueError(
        f"{name} takes no custom timesteps: use DDIMScheduler, EulerDiscreteScheduler, "
        "DPMSolverMultistepScheduler or, for flow matching, FlowMatchEulerDiscreteScheduler."
    )
