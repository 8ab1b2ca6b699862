"""Loss weightings that are one function of log-SNR, the same objective for every target.

Each maps log-SNRs, (T,) float64, finite and cleanest first, to the logarithm of its weight on the
squared error of x0. Its further arguments are the weighting's parameters; a keyword-only
``prediction_type`` is filled in for it.

S = exp(log_snr); t = 1 / (1 + sqrt S) is the noise fraction of flow matching.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.checks import above_zero, finite, flag, inside
from diffusers_curriculum.weighting.conversion import softplus

WEIGHTINGS: Catalogue[Callable[..., Tensor]] = Catalogue("loss weighting", reserved=("none",))
register = WEIGHTINGS.register

_PRECONDITIONED = (
    "preconditioned=False weights the error of the flow velocity, True that of x0, as diffusers' "
    "script does by default (--precondition_outputs 1)"
)


@register("unit_sample", formula="W_x0 = 1", source="mean squared error of x0")
def unit_sample(log_snr: Tensor) -> Tensor:
    """log of W_x0 = 1: the plain squared error of x0."""
    return torch.zeros_like(log_snr)


@register("unit_epsilon", formula="W_eps = 1", source="arXiv 2006.11239, eq. 14")
def unit_epsilon(log_snr: Tensor) -> Tensor:
    """log of W_x0 = S: the plain squared error of the noise (arXiv 2006.11239, eq. 14)."""
    return log_snr


@register("unit_v", formula="W_v = 1", source="arXiv 2202.00512")
def unit_v(log_snr: Tensor) -> Tensor:
    """log of W_x0 = 1 + S: the plain squared error of v (arXiv 2202.00512, "SNR + 1")."""
    return softplus(log_snr)


@register("unit_flow", formula="W_flow = 1", source="arXiv 2209.03003; arXiv 2210.02747")
def unit_flow(log_snr: Tensor) -> Tensor:
    """log of W_x0 = (1 + sqrt S)^2: the plain squared error of the flow-matching velocity (arXiv
    2209.03003, 2210.02747)."""
    return 2 * softplus(log_snr / 2)


@register("min_snr", formula="W_x0 = min(S, gamma)", source="arXiv 2303.09556")
def min_snr(log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    """log of W_x0 = min(S, gamma) (arXiv 2303.09556)."""
    above_zero("gamma", gamma)
    return log_snr.clamp_max(math.log(gamma))


@register(
    "min_snr_plus_one",
    formula="W_v = min(S + 1, gamma) / (S + 1)",
    source="diffusers 0.22 to 0.25 (pull request 5238, taken back in 6307)",
    note="made for v: a level at zero SNR keeps weight 1, where min_snr gives it 0",
)
def min_snr_plus_one(log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    """log of W_x0 = min(S + 1, gamma), that is min(S + 1, gamma) / (S + 1) on v, as diffusers had
    it from pull request 5238 to 6307; not that of arXiv 2303.09556."""
    above_zero("gamma", gamma)
    return softplus(log_snr).clamp_max(math.log(gamma))


@register(
    "soft_min_snr",
    formula="W_x0 = S gamma / (S + gamma)",
    source="arXiv 2401.11605; crowsonkb/k-diffusion",
    note="gamma = 1 / sigma_data^2; the same weight as sigmoid with bias = ln gamma",
)
def soft_min_snr(log_snr: Tensor, gamma: float = 4.0) -> Tensor:
    """log of W_x0 = S gamma / (S + gamma) (arXiv 2401.11605; gamma = 1 / sigma_data^2)."""
    above_zero("gamma", gamma)
    return log_snr - softplus(log_snr - math.log(gamma))


@register("max_snr", formula="W_x0 = max(S, 1)", source="arXiv 2202.00512, truncated SNR")
def max_snr(log_snr: Tensor) -> Tensor:
    """log of W_x0 = max(S, 1) (arXiv 2202.00512, "truncated SNR")."""
    return log_snr.clamp_min(0.0)


@register(
    "p2",
    formula="W_x0 = S / (k + S)^gamma",
    source="arXiv 2204.00227",
    note="the paper's runs use gamma 0.5 or 1; its code has gamma 0, which is off",
)
def p2(log_snr: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """log of W_x0 = S / (k + S)^gamma (arXiv 2204.00227)."""
    above_zero("k", k)
    above_zero("gamma", gamma)
    return log_snr - gamma * (math.log(k) + softplus(log_snr - math.log(k)))


@register("debiased", formula="W_eps = 1 / sqrt S", source="arXiv 2310.08442")
def debiased(log_snr: Tensor) -> Tensor:
    """log of W_x0 = sqrt S, that is 1 / sqrt S on epsilon (arXiv 2310.08442)."""
    return log_snr / 2


@register(
    "edm",
    formula="W_x0 = S + 1 / sigma_data^2",
    source="arXiv 2206.00364, table 1",
    note="a unit loss on the output of EDM's preconditioned network",
)
def edm(log_snr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """log of W_x0 = S + 1 / sigma_data^2 (arXiv 2206.00364, table 1: (sigma^2 + sigma_data^2) /
    (sigma sigma_data)^2); sigma_data is the standard deviation of the data."""
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
    """log of W_x0 = e^bias sigmoid(log_snr - bias), that is sigmoid(bias - log_snr) on epsilon
    (arXiv 2303.00848, 2410.19324, which state it per unit of log-SNR: measure="log_snr")."""
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
    """log of the W_x0 that weights the flow velocity, or (``preconditioned``) x0, by t^-2
    (compute_loss_weighting_for_sd3 of diffusers; despite its name sigma^-2)."""
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
    """log of the W_x0 that weights the flow velocity, or (``preconditioned``) x0, by
    2 / (pi (1 - 2t + 2t^2)) (arXiv 2403.03206; compute_loss_weighting_for_sd3 of diffusers)."""
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
    """log of the W_x0 of SpeeD's change-aware weight (arXiv 2405.17403, as in the authors' code):
    on epsilon, 1 - c + (2c - 1) g on the first ``tau`` of the levels and 1 on the others, where g
    is the central difference of 1 - abar = sigmoid(-log_snr) from level to level, scaled to [0, 1]
    over the whole schedule.

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
