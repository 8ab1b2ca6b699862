"""What a user should think over before training: warnings that follow from the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.inference_spacing import HARDLY_TRAINED, trained_share, visited_indices
from diffusers_curriculum.noise_levels import NoiseLevels

TWICE = 1.25


def advice(
    levels: NoiseLevels,
    corrected: Tensor,
    weights: Tensor | None,
    over_run: np.ndarray,
    inference: Any = None,
    inference_steps: int = 50,
) -> tuple[str, ...]:
    """The warnings for one run; none is the best answer.

    Args:
        corrected: (T,) drawn mass x importance, which a full correction makes uniform again.
        weights: (T,) loss weights or None.
        over_run: (T,) the mass that a step of the run draws from on average.
        inference: the scheduler that samples, None to leave it out.
    """
    warnings = [*_emphasis(corrected, weights), *_never_minimised(levels, weights)]
    if inference is not None:
        warnings += laplace_betas(inference)
        warnings += _inference(levels, torch.from_numpy(over_run), inference, inference_steps)
    return tuple(warnings)


def double_emphasis(corrected: Tensor, weights: Tensor) -> float:
    """How much more loss weight a drawn level has than a uniform one: E_p[w] / E_u[w].

    p is the drawn mass x importance (which sums to 1), u the uniform law, w the weights on the
    network's own target. 1 where either is flat or the two have nothing to do with each other,
    above it where they favour the same levels, below it where they favour opposite ones. From
    ``TWICE`` on the same levels are emphasised twice. Any positive factor on the weights cancels.
    """
    w = weights.cpu().double()
    return float((corrected * w).sum() / w.mean())


def normalised(quartiles: Sequence[float], data_std: float | None) -> str:
    """Where ``quartiles`` of log-SNR lie for data of a standard deviation, in words."""
    if data_std is None:
        median = quartiles[1]
        return (
            "normalised log-SNR (log-SNR + 2 ln of the data's standard deviation): median "
            f"{median:.2f} for data of 1, as latents about are, {median - math.log(4):.2f} for "
            "data of 0.5, as pixels about are; a run measures its own"
        )
    moved = ", ".join(f"{value + 2 * math.log(data_std):.2f}" for value in quartiles)
    return f"normalised log-SNR, for data of standard deviation {data_std:.4g}: quartiles {moved}"


def laplace_betas(scheduler: Any) -> Iterator[str]:
    """That diffusers' beta_schedule "laplace" is not the law of that name, if it is used."""
    if getattr(scheduler, "config", {}).get("beta_schedule") != "laplace":
        return
    log_snr = NoiseLevels.from_scheduler(scheduler).log_snr
    quarters = torch.quantile(log_snr, torch.tensor([0.75, 0.5, 0.25], dtype=log_snr.dtype))
    told = ", ".join(f"{float(value):.2f}" for value in quarters)
    yield (
        "beta_schedule='laplace' of diffusers is not the law of arXiv 2407.03297: after a quarter, "
        f"a half and three quarters of its timesteps the log-SNR is {told}, where that law has "
        "0.35, 0.00, -0.35. For the law, keep another beta schedule (squaredcos_cap_v2) and draw "
        "with the density 'laplace'."
    )


def _emphasis(corrected: Tensor, weights: Tensor | None) -> Iterator[str]:
    if weights is None or not bool(weights.any()):
        return
    ratio = double_emphasis(corrected, weights)
    if ratio >= TWICE:
        yield (
            "the sampler and the loss weight emphasise the same noise levels twice: a drawn level "
            f"has {ratio:.2f} times the loss weight of a uniform one (told from {TWICE} on). Use "
            "one of the two, or importance_correction='full' to leave the emphasis to the weight."
        )


def _never_minimised(levels: NoiseLevels, weights: Tensor | None) -> Iterator[str]:
    zero = None if weights is None else (weights.cpu() == 0).nonzero().flatten()
    if zero is not None and len(zero):
        yield (
            f"the loss weight is 0 at {len(zero)} of {len(levels)} noise levels (first index "
            f"{int(zero[0])}, log-SNR {float(levels.log_snr[zero[0]]):.1f}): they are drawn but "
            "never trained."
        )


def _inference(levels: NoiseLevels, mass: Tensor, scheduler: Any, steps: int) -> Iterator[str]:
    """Levels that inference visits although they are hardly ever drawn: those that, with the levels
    nearest to them, get less than ``HARDLY_TRAINED`` of their share of uniform timesteps."""
    name = type(scheduler).__name__
    try:
        visited = visited_indices(scheduler, levels, steps)
    except (ValueError, TypeError) as error:
        yield f"which levels {name} visits could not be looked at: {error}"
        return
    share = trained_share(mass, visited)
    poor = visited[share < HARDLY_TRAINED]
    if not len(poor):
        return
    trained = (mass * len(mass) >= HARDLY_TRAINED).nonzero().flatten()
    low, high = float(levels.log_snr[trained[-1]]), float(levels.log_snr[trained[0]])
    yield (
        f"{len(poor)} of the {len(visited)} levels that {name} visits in {steps} steps are hardly "
        f"ever trained (drawn less than {HARDLY_TRAINED:.0%} as often as under uniform timesteps), "
        f"at log-SNR {_ranges(levels, visited, share < HARDLY_TRAINED)}: train with a floor of "
        f"0.1, or sample with the law's own spacing, {low:.1f} to {high:.1f}, which "
        f"inference_spacing.fit_inference(scheduler, sampler, {steps}) makes for DDIM, "
        "DPM-Solver++ and Euler."
    )


def _ranges(levels: NoiseLevels, visited: Tensor, chosen: Tensor) -> str:
    """The runs of ``chosen`` (N,) bool among the ``visited`` levels, noisiest first."""
    log_snr = levels.log_snr[visited].flip(0).tolist()
    runs = groupby(zip(chosen.flip(0).tolist(), log_snr, strict=True), key=itemgetter(0))
    ranges = [[value for _, value in run] for is_chosen, run in runs if is_chosen]
    return " and ".join(f"{run[0]:.1f} to {run[-1]:.1f}" for run in ranges)
