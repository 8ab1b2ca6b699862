"""Loss weights of a schedule: one number for each noise level."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.checks import flag, not_negative, one_of
from diffusers_curriculum.noise_levels import NoiseLevels, cell_edges
from diffusers_curriculum.weighting.formulas import WEIGHTINGS, bounded, to_target

MEASURES = ("draw", "log_snr")
"""What a weighting may be relative to: the law that is drawn, or log-SNR."""


def loss_weights(
    name: str,
    levels: NoiseLevels,
    prediction_type: str | None = None,
    *,
    measure: str = "draw",
    normalise: bool = False,
    masses: Tensor | None = None,
    terminal_weight: float | None = None,
    **parameters: Any,
) -> Tensor | None:
    """Weight of each noise level on the mean squared error of the network's own target.

    Args:
        name: "none" (returns None) or a key of ``WEIGHTINGS``.
        prediction_type: "epsilon", "v_prediction", "sample", "flow" or "edm"; default the levels'
            own. On levels with sigma_data, "v_prediction" is EDM's -F.
        measure: what the formula W is a density against. "draw": each draw has weight W. "log_snr":
            W is meant per unit of log-SNR l (arXiv 2303.00848), so a draw has weight W |dl/dt|, t
            in [0, 1] the fraction of the schedule; in other words W over the density of uniformly
            drawn levels in l, with no further factor. The mean weight is then the integral of W dl
            over the schedule.
        normalise: divide by the mean weight under ``masses``.
        masses: (T,) probabilities of the levels for ``normalise``, default 1 / T each. Where losses
            carry an importance as well, pass mass x importance.
        terminal_weight: weight of a level at zero SNR in place of the limit there, in the scale of
            the other weights before ``normalise``.
        parameters: of the weighting.

    Returns:
        (T,) float32. For min_snr on a variance preserving schedule the values are those of the
        float32 arithmetic in diffusers' scripts, bit for bit, wherever that is finite (measure
        "draw", not normalised).

    Raises:
        ValueError: unknown name, parameter, measure or prediction type, an option without effect,
            or a weight that is infinite at a level of this schedule.
    """
    plain = measure == "draw" and not normalise and masses is None and terminal_weight is None
    if name == "none" and plain and not parameters:
        return None
    kind = prediction_type or levels.prediction_type
    flag("normalise", normalise)
    needs_all = name in WEIGHTINGS and WEIGHTINGS.entry(name).whole_schedule
    if needs_all or measure != "draw" or normalise:
        _check_schedule(levels, name)
    logs = log_weight(name, levels.log_snr, kind, levels=levels, **parameters)
    weights = (logs + _log_jacobian(levels.log_snr, measure)).exp()
    if name == "min_snr" and measure == "draw":
        weights = _as_diffusers(weights, levels, kind, **parameters)
    if terminal_weight is not None:
        weights = _with_terminal(weights, levels, terminal_weight)
    _check_finite(weights, levels, f"loss weighting {name!r} on {kind}", measure)
    return (weights / _mean(weights, normalise, masses)).float()


def log_weight(
    name: str,
    log_snr: Tensor,
    prediction_type: str,
    /,
    *,
    levels: NoiseLevels | None = None,
    **parameters: Any,
) -> Tensor:
    """Logarithm of a weighting's weight on the squared error of one target, per draw; errors as of
    :func:`loss_weights`.

    Args:
        log_snr: (N,) any log-SNRs, infinite ones allowed; for "speed" a whole schedule, cleanest
            first.
        levels: whose sigma_data the target has, needed for the prediction type "edm".

    Returns:
        (N,) float64; below -700 or above 700 it stands for a weight of 0 or infinity.
    """
    if name == "none":
        raise ValueError(
            "loss weighting 'none' has no weights, parameters or options: drop them, or name a "
            "weighting."
        )
    weighting, at = WEIGHTINGS.look_up(name), bounded(log_snr)
    takes = inspect.signature(weighting).parameters.values()
    known = [p.name for p in takes if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    WEIGHTINGS.check_parameters(name, parameters, known)
    on_target = to_target(prediction_type, at, None if levels is None else levels.sigma_data)
    own = (
        {"prediction_type": prediction_type} if "prediction_type" in {p.name for p in takes} else {}
    )
    return weighting(at, **parameters, **own) + on_target


def _check_schedule(levels: NoiseLevels, name: str) -> None:
    """Refuse a batch of levels where neighbours or a mean over all of them matter."""
    whole = bool((levels.log_snr.diff() <= 0).all()) and not bool(levels.edges.isnan().any())
    if len(levels) < 2 or not whole:
        raise ValueError(
            f"loss weighting {name!r} with these options needs a whole schedule, cleanest level "
            f"first, and got {len(levels)} levels that are none: take the weights of the schedule "
            "(NoiseLevels.from_scheduler) and index them."
        )


def _log_jacobian(log_snr: Tensor, measure: str) -> Tensor:
    """(T,) log |dl/dt| by the width of each level's cell, or 0 for the measure "draw"."""
    one_of("measure", measure, MEASURES)
    if measure == "draw":
        return torch.zeros_like(log_snr)
    per_level = (-cell_edges(log_snr, "half").diff()).log()
    for end, neighbour in ((0, 1), (-1, -2)):
        if bool(log_snr[end].isinf()):
            # The limit on a schedule whose sqrt S (or 1 / sqrt S) runs to 0 linearly in t, as it
            # does in flow matching and with rescaled betas: |dl/dt| = 2 |d sqrt S / dt| / sqrt S.
            rest = (bounded(log_snr[end]) - log_snr[neighbour]).abs() / 2
            per_level[end] = math.log(2) + rest
    return math.log(len(log_snr)) + per_level


def _as_diffusers(weights: Tensor, levels: NoiseLevels, kind: str, gamma: float = 5.0) -> Tensor:
    """min_snr in the order of operations of diffusers' scripts; the limit where that is 0/0."""
    if levels.sigma_data is not None:  # their v_prediction is another one
        return weights
    alpha, sigma = (x.square().float().sqrt() for x in (levels.alpha, levels.sigma))
    snr = (alpha / sigma) ** 2
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}.get(kind)
    if divisor is None:
        return weights
    exact = snr.clamp_max(min(gamma, torch.finfo(snr.dtype).max)) / divisor
    return torch.where(exact.isfinite(), exact.double(), weights)


def _with_terminal(weights: Tensor, levels: NoiseLevels, value: float) -> Tensor:
    not_negative("terminal_weight", value)
    terminal = levels.log_snr == -torch.inf
    if not bool(terminal.any()):
        raise ValueError(
            f"terminal_weight={value!r} has no effect: the noisiest level of this schedule has "
            f"log-SNR {float(levels.log_snr[-1]):.4g}, not zero SNR; leave it out."
        )
    return torch.where(terminal, float(value), weights)


def _check_finite(weights: Tensor, levels: NoiseLevels, what: str, measure: str) -> None:
    bad = (~weights.float().isfinite()).nonzero().flatten().tolist()
    if not bad:
        return
    remedy = "use min_snr, soft_min_snr or sigmoid"
    if measure == "log_snr":
        what, remedy = f"{what} per unit of log-SNR", "use measure='draw'"
    if bool((levels.log_snr[bad] == -torch.inf).all()):
        remedy += ", give terminal_weight (the weight of that level)"
    raise ValueError(
        f"{what} is infinite at {len(bad)} of the schedule's levels (index {bad[0]}, log-SNR "
        f"{float(levels.log_snr[bad[0]])}): {remedy}, or a schedule without zero terminal SNR."
    )


def _mean(weights: Tensor, normalise: bool, masses: Tensor | None) -> Tensor | float:
    if not normalise:
        if masses is not None:
            raise ValueError("masses have no effect without normalise=True: leave them out.")
        return 1.0
    uniform = torch.full_like(weights, 1 / len(weights))
    law = uniform if masses is None else _checked_masses(masses, weights)
    mean = (law * weights).sum()
    if not bool(mean > 0):
        raise ValueError(
            "the weights are 0 at every level that is drawn, and nothing is left to normalise: "
            "choose another weighting, or masses where it is positive."
        )
    return mean


def _checked_masses(masses: Any, weights: Tensor) -> Tensor:
    if not isinstance(masses, Tensor) or masses.shape != weights.shape:
        shape = tuple(masses.shape) if isinstance(masses, Tensor) else repr(masses)
        raise ValueError(f"masses must be a tensor of shape ({len(weights)},), not {shape}.")
    masses = masses.to(weights.device, torch.float64)
    total = float(masses.sum())
    if not (bool((masses >= 0).all()) and abs(total - 1) < 1e-5):
        raise ValueError(
            f"masses must be 0 or more and sum to 1; the least is {float(masses.min()):.4g}, the "
            f"sum {total:.6g}."
        )
    return masses
