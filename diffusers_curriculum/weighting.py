"""Loss weights as functions of log-SNR and prediction type.

A weighting is defined once, by the logarithm of its weight on the squared error of x0, and carried
to the network's own target by

    W_epsilon = W_x0 / S,   W_v = W_x0 / (1 + S),   W_flow = W_x0 / (1 + sqrt S)^2

with S = exp(log_snr), in log space, where the limits at S = 0 and S = infinity come out by
themselves.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusers_curriculum.noise_levels import NoiseLevels

# Beyond it exp() is 0 or infinite in float64 for every weight below, which is the limit wanted.
_INFINITY = 1e4


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), to full precision (torch's own turns linear above 20)."""
    return -logsigmoid(-x)


_TO_TARGET: dict[str, Callable[[Tensor], Tensor]] = {
    "sample": torch.zeros_like,
    "epsilon": lambda log_snr: -log_snr,
    "v_prediction": lambda log_snr: -softplus(log_snr),
    "flow": lambda log_snr: -2 * softplus(log_snr / 2),
}


def min_snr(log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    """log of W_x0 = min(S, gamma) (arXiv 2303.09556)."""
    _check_positive("gamma", gamma)
    return log_snr.clamp_max(math.log(gamma))


def soft_min_snr(log_snr: Tensor, gamma: float = 4.0) -> Tensor:
    """log of W_x0 = S gamma / (S + gamma) (arXiv 2401.11605; gamma = 1 / sigma_data^2)."""
    _check_positive("gamma", gamma)
    return log_snr - softplus(log_snr - math.log(gamma))


def p2(log_snr: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """log of W_x0 = S / (k + S)^gamma (arXiv 2204.00227)."""
    _check_positive("k", k)
    _check_positive("gamma", gamma)
    return log_snr - gamma * (math.log(k) + softplus(log_snr - math.log(k)))


def debiased(log_snr: Tensor) -> Tensor:
    """log of W_x0 = sqrt S, that is 1 / sqrt S on epsilon (arXiv 2310.08442)."""
    return log_snr / 2


def sigmoid(log_snr: Tensor, bias: float = 0.0) -> Tensor:
    """log of W_x0 = e^bias sigmoid(log_snr - bias), that is sigmoid(bias - log_snr) on epsilon
    (arXiv 2303.00848, 2410.19324)."""
    if not (isinstance(bias, int | float) and math.isfinite(bias)):
        raise ValueError(f"bias={bias!r} must be a finite number.")
    return bias - softplus(bias - log_snr)


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "p2": p2,
    "debiased": debiased,
    "sigmoid": sigmoid,
}


def loss_weights(
    name: str, levels: NoiseLevels, prediction_type: str | None = None, **parameters: float
) -> Tensor | None:
    """Weight of each noise level on the mean squared error of the network's own target.

    Args:
        name: "none" (returns None) or a key of ``WEIGHTINGS``.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow"; default the levels' own.
        parameters: of the weighting.

    Returns:
        (T,) float32. For min_snr on a variance preserving schedule the values are those of the
        float32 arithmetic in diffusers' scripts, bit for bit, wherever that is finite.

    Raises:
        ValueError: unknown name, parameter or prediction type, or a weight that is infinite at a
            level of this schedule.
    """
    if name == "none" and not parameters:
        return None
    kind = prediction_type or levels.prediction_type
    log_weight = _lookup(name, parameters)(_bounded(levels.log_snr), **parameters)
    if kind not in _TO_TARGET:
        raise ValueError(
            f"prediction_type={kind!r} has no weight: use one of {', '.join(_TO_TARGET)}."
        )
    weights = (log_weight + _TO_TARGET[kind](_bounded(levels.log_snr))).exp().float()
    if not bool(weights.isfinite().all()):
        bad = (~weights.isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"loss weighting {name!r} on {kind} is infinite at {len(bad)} of the schedule's levels "
            f"(index {bad[0]}, log-SNR {float(levels.log_snr[bad[0]])}): use min_snr, soft_min_snr "
            "or sigmoid, or a schedule without zero terminal SNR."
        )
    return _as_diffusers(weights, levels, kind, **parameters) if name == "min_snr" else weights


def _as_diffusers(weights: Tensor, levels: NoiseLevels, kind: str, gamma: float = 5.0) -> Tensor:
    """min_snr in the order of operations of diffusers' scripts; the limit where that is 0/0."""
    alpha, sigma = (x.square().float().sqrt() for x in (levels.alpha, levels.sigma))
    snr = (alpha / sigma) ** 2
    divisor = {"epsilon": snr, "v_prediction": snr + 1}.get(kind)
    if divisor is None:
        return weights
    exact = snr.clamp_max(gamma) / divisor
    return torch.where(exact.isfinite(), exact, weights)


def _bounded(log_snr: Tensor) -> Tensor:
    return log_snr.double().clamp(-_INFINITY, _INFINITY)


def _lookup(name: str, parameters: dict[str, float]) -> Callable[..., Tensor]:
    if name not in WEIGHTINGS:
        names = ", ".join(["none", *WEIGHTINGS])
        raise ValueError(
            f"loss weighting {name!r} is unknown or takes no parameters: choose from {names}."
        )
    known = list(inspect.signature(WEIGHTINGS[name]).parameters)[1:]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(
            f"loss weighting {name!r} has no parameter {unknown[0]!r}: it takes {known or 'none'}."
        )
    return WEIGHTINGS[name]


def _check_positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be a number greater than 0.")
