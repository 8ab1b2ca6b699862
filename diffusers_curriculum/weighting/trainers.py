"""Loss weightings of widespread training code, for comparison and for moving a run from there.

Those that bear the name of a paper's weighting are another formula: each is another objective for
each target, and defined for some only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusers_curriculum.checks import above_zero
from diffusers_curriculum.weighting.formulas import register, softplus, to_target

_MAX_LOG_SNR = math.log(1000)  # kohya-ss and OneTrainer clip S there for "debiased"


@register(
    "bell",
    formula="W_flow = (exp(-2 (t - 1/2)^2) - e^(-1/2)) / c, c its mean over t in [0, 1]",
    source="DiffSynth-Studio, FlowMatchScheduler (bsmntw); ostris/ai-toolkit, weighted",
    families="flow",
    note="mean 1 under uniform t, on a shifted schedule only with normalise=True; 0 at both ends",
)
def bell(log_snr: Tensor) -> Tensor:
    """log of a bell-shaped weight on the flow velocity, with its minimum, at both ends, taken away;
    exp(-1/2) expm1(2 t (1 - t)), so that the ends keep their digits."""
    log_height = math.log(2) + logsigmoid(log_snr / 2) + logsigmoid(-log_snr / 2)
    height = log_height.exp()
    curve = torch.where(height > 1e-9, torch.expm1(height) / height, 1.0).log()
    mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - math.exp(-0.5)
    return 2 * softplus(log_snr / 2) + log_height + curve - 0.5 - math.log(mean)


@register(
    "debiased_kohya",
    formula="W_v = 1 / (1 + S), W_eps = 1 / sqrt S, S clipped at 1000",
    source="kohya-ss/sd-scripts, --debiased_estimation_loss",
    families="vp",
    note="epsilon and v only; on v it is unit_sample, not the paper's weight (debiased)",
)
def debiased_kohya(log_snr: Tensor, *, prediction_type: str) -> Tensor:
    clipped = log_snr.clamp_max(_MAX_LOG_SNR)
    weights = {"epsilon": -clipped / 2, "v_prediction": -softplus(clipped)}
    return _on_x0("debiased_kohya", weights, log_snr, prediction_type, "debiased")


@register(
    "debiased_onetrainer",
    formula="W_v = 1 / sqrt(1 + S), W_eps = 1 / sqrt S, S clipped at 1000",
    source="Nerogar/OneTrainer, DEBIASED_ESTIMATION",
    families="vp",
    note="epsilon and v only; on v it tends to 1 at low SNR, the paper's weight (debiased) to 0",
)
def debiased_onetrainer(log_snr: Tensor, *, prediction_type: str) -> Tensor:
    clipped = log_snr.clamp_max(_MAX_LOG_SNR)
    weights = {"epsilon": -clipped / 2, "v_prediction": -softplus(clipped) / 2}
    return _on_x0("debiased_onetrainer", weights, log_snr, prediction_type, "debiased")


@register(
    "p2_onetrainer",
    formula="W_v = (2 + S)^-gamma",
    source="Nerogar/OneTrainer, P2",
    families="vp",
    note="v only (its weight on epsilon is p2 with k = 1); it adds 1 to S twice",
)
def p2_onetrainer(log_snr: Tensor, gamma: float = 1.0, *, prediction_type: str) -> Tensor:
    above_zero("gamma", gamma)
    log_two = math.log(2)
    weights = {"v_prediction": -gamma * (log_two + softplus(log_snr - log_two))}
    return _on_x0("p2_onetrainer", weights, log_snr, prediction_type, "p2")


def _on_x0(
    name: str, weights: dict[str, Tensor], log_snr: Tensor, prediction_type: str, instead: str
) -> Tensor:
    """log of the W_x0 behind the weights on some targets; ValueError for another target."""
    if prediction_type not in weights:
        raise ValueError(
            f"loss weighting {name!r} is defined for {' and '.join(weights)} only, not for "
            f"prediction_type={prediction_type!r}: use {instead}, which is defined for all."
        )
    return weights[prediction_type] - to_target(prediction_type, log_snr)
