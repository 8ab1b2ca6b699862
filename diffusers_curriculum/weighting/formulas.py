"""Loss weightings, each one function of log-SNR, and their conversion to every target.

Each maps log-SNRs, (T,) float64, finite and cleanest first, to the logarithm of its weight on the
squared error of x0. Its further arguments are the weighting's parameters; a keyword-only
``prediction_type`` is filled in for it. With S = exp(log_snr),

    W_epsilon = W_x0 / S,   W_v = W_x0 / (1 + S),   W_flow = W_x0 / (1 + sqrt S)^2,
    W_edm = W_x0 / (S + 1 / sigma_data^2)

as the squared errors of one wrong x0, seen as epsilon, v, flow and EDM's F (arXiv 2206.00364),
stand in the inverse ratio; the limits at S = 0 and S = infinity come out by themselves.
t = 1 / (1 + sqrt S) is the noise fraction of flow matching.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusers_curriculum.catalogue import GROUPS, Catalogue
from diffusers_curriculum.checks import above_zero, finite, flag, inside, one_of

WEIGHTINGS: Catalogue[Callable[..., Tensor]] = Catalogue(
    "loss weighting", reserved=("none",), group=GROUPS[1]
)
"""All loss weightings by name: log of the weight on x0 at each log-SNR."""
register = WEIGHTINGS.register
"""Decorator that puts a weighting of one's own into the catalogue: ``@register("name", ...)``."""

# Beyond it exp() is 0 or infinite in float64 for every weight, which is the limit wanted.
_INFINITY = 1e4
_PRECONDITIONED = (
    "preconditioned=False weights the error of the flow velocity, True that of x0, as diffusers' "
    "script does by default (--precondition_outputs 1)"
)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), to full precision (torch's own turns linear above 20)."""
    return -logsigmoid(-x)


# log of (weight on the target / weight on x0), by prediction type
_TO_TARGET: dict[str, Callable[[Tensor], Tensor]] = {
    "sample": torch.zeros_like,
    "epsilon": lambda log_snr: -log_snr,
    "v_prediction": lambda log_snr: -softplus(log_snr),
    "flow": lambda log_snr: -2 * softplus(log_snr / 2),
}
TARGETS = (*_TO_TARGET, "edm")
"""What a network may predict, as :func:`to_target` takes it."""


def to_target(prediction_type: str, log_snr: Tensor, sigma_data: float | None = None) -> Tensor:
    """log of (weight on the target / weight on x0) at each log-SNR.

    Args:
        prediction_type: one of ``TARGETS``.
        log_snr: any shape, finite.
        sigma_data: standard deviation of the data, needed for "edm". Schedulers that have one call
            -F "v_prediction", so with it that is another name of "edm".

    Raises:
        ValueError: unknown prediction type, or "edm" without sigma_data.
    """
    one_of("prediction_type", prediction_type, TARGETS)
    if prediction_type == "edm" and sigma_data is None:
        raise ValueError(
            "prediction_type='edm' has no weight without sigma_data, the standard deviation of "
            "the data: use the levels of an EDM scheduler, or pass it."
        )
    if sigma_data is not None and prediction_type in ("edm", "v_prediction"):
        floor = -2 * math.log(sigma_data)
        return -floor - softplus(log_snr - floor)
    return _TO_TARGET[prediction_type](log_snr)


def bounded(log_snr: Tensor) -> Tensor:
    """``log_snr`` in float64, its infinities replaced by numbers that stand for them."""
    return log_snr.double().clamp(-_INFINITY, _INFINITY)


register("unit_sample", formula="W_x0 = 1", source="mean squared error of x0")(
    lambda log_snr: torch.zeros_like(log_snr)
)
register("unit_epsilon", formula="W_eps = 1", source="arXiv 2006.11239, eq. 14")(
    lambda log_snr: log_snr
)
register("unit_v", formula="W_v = 1", source="arXiv 2202.00512")(lambda log_snr: softplus(log_snr))
register("unit_flow", formula="W_flow = 1", source="arXiv 2209.03003; arXiv 2210.02747")(
    lambda log_snr: 2 * softplus(log_snr / 2)
)


@register("min_snr", formula="W_x0 = min(S, gamma)", source="arXiv 2303.09556")
def min_snr(log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    above_zero("gamma", gamma)
    return log_snr.clamp_max(math.log(gamma))


@register(
    "min_snr_plus_one",
    formula="W_v = min(S + 1, gamma) / (S + 1)",
    source="diffusers 0.22 to 0.25 (pull request 5238, taken back in 6307)",
    note="made for v: a level at zero SNR keeps weight 1, where min_snr gives it 0",
)
def min_snr_plus_one(log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    """log of W_x0 = min(S + 1, gamma); not that of arXiv 2303.09556."""
    above_zero("gamma", gamma)
    return softplus(log_snr).clamp_max(math.log(gamma))


@register(
    "soft_min_snr",
    formula="W_x0 = S gamma / (S + gamma)",
    source="arXiv 2401.11605; crowsonkb/k-diffusion",
    note="gamma = 1 / sigma_data^2; the same weight as sigmoid with bias = ln gamma",
)
def soft_min_snr(log_snr: Tensor, gamma: float = 4.0) -> Tensor:
    above_zero("gamma", gamma)
    return log_snr - softplus(log_snr - math.log(gamma))


register("max_snr", formula="W_x0 = max(S, 1)", source="arXiv 2202.00512, truncated SNR")(
    lambda log_snr: log_snr.clamp_min(0.0)
)


@register(
    "p2",
    formula="W_x0 = S / (k + S)^gamma",
    source="arXiv 2204.00227",
    note="the paper's runs use gamma 0.5 or 1; its code has gamma 0, which is off",
)
def p2(log_snr: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    above_zero("k", k)
    above_zero("gamma", gamma)
    return log_snr - gamma * (math.log(k) + softplus(log_snr - math.log(k)))


register("debiased", formula="W_eps = 1 / sqrt S", source="arXiv 2310.08442")(
    lambda log_snr: log_snr / 2
)


@register(
    "edm",
    formula="W_x0 = S + 1 / sigma_data^2",
    source="arXiv 2206.00364, table 1",
    note="a unit loss on the output of EDM's preconditioned network of that sigma_data: 0.5 unless "
    "it is given, also where the schedule's is another",
)
def edm(log_snr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """That is (sigma^2 + sigma_data^2) / (sigma sigma_data)^2; sigma_data is the standard deviation
    of the data."""
    above_zero("sigma_data", sigma_data)
    floor = -2 * math.log(sigma_data)
    return floor + softplus(log_snr - floor)


@register(
    "sigmoid",
    formula="W_eps = sigmoid(bias - l)",
    source="arXiv 2303.00848; arXiv 2410.19324",
    note='bias 0 is this library\'s default; the papers state it per unit of log-SNR: "log_snr"',
)
def sigmoid(log_snr: Tensor, bias: float = 0.0) -> Tensor:
    """log of W_x0 = e^bias sigmoid(log_snr - bias)."""
    finite("bias", bias)
    return bias - softplus(bias - log_snr)


@register(
    "sigma_sqrt",
    formula="W_flow = 1 / t^2",
    source="diffusers, compute_loss_weighting_for_sd3",
    families="flow",
    note=_PRECONDITIONED + ", which makes it the plain flow loss",
)
def sigma_sqrt(log_snr: Tensor, preconditioned: bool = False) -> Tensor:
    """Despite its name sigma^-2, on the flow velocity or (``preconditioned``) on x0."""
    flag("preconditioned", preconditioned)
    return (2 if preconditioned else 4) * softplus(log_snr / 2)


@register(
    "cosmap",
    formula="W_flow = 2 / (pi (1 - 2t + 2t^2))",
    source="arXiv 2403.03206; diffusers, compute_loss_weighting_for_sd3",
    families="flow",
    note=_PRECONDITIONED,
)
def cosmap(log_snr: Tensor, preconditioned: bool = False) -> Tensor:
    """The weight on the flow velocity or (``preconditioned``) on x0."""
    flag("preconditioned", preconditioned)
    velocity = 2 * softplus(log_snr / 2)  # log of t^-2
    weight = math.log(2 / math.pi) + velocity - softplus(log_snr)
    return weight if preconditioned else weight + velocity


@register(
    "speed",
    formula="W_eps = 1 - c + (2c - 1) minmax(d(1 - abar)/di) below tau T, 1 above",
    source="arXiv 2405.17403; NUS-HPC-AI-Lab/SpeeD",
    families="vp",
    note="c is the paper's lambda; tau up to 1 is a fraction of the schedule, above 1 a number of "
    "its timesteps (the authors' 700 of 1000)",
    whole_schedule=True,
)
def speed(log_snr: Tensor, contrast: float = 0.6, tau: float = 0.7) -> Tensor:
    """SpeeD's change-aware weight, as in the authors' code: the change is the central difference of
    1 - abar = sigmoid(-log_snr) from level to level, scaled to [0, 1] over the whole schedule.

    Args:
        log_snr: (T,) the whole schedule, cleanest first.
        contrast: the paper's lambda, in [0, 1]; weights lie in [1 - contrast, contrast].
        tau: up to 1 a fraction of the schedule, above 1 a number of its levels.

    Raises:
        ValueError: a number out of range, or a schedule on which 1 - abar is a straight line.
    """
    count = len(log_snr)
    inside("contrast", contrast, 0, 1)
    inside("tau", tau, 0, count)
    change = torch.gradient(torch.sigmoid(-log_snr))[0]
    span = change.max() - change.min()
    if not bool(span > 0):
        raise ValueError(
            f"'speed' on these {count} levels: the noise power grows by one constant step, which "
            "leaves nothing to scale; use another weighting."
        )
    weight = 1 - contrast + (2 * contrast - 1) * (change - change.min()) / span
    weight[round(tau * count if tau <= 1 else tau) :] = 1.0
    return log_snr + weight.clamp_min(0.0).log()
