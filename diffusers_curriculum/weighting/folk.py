"""Weights of widespread training code that differ from the formula whose name they bear.

They are here for comparison and for moving a run from there. Each is another objective for each
prediction type, and defined for some only.
"""

from __future__ import annotations

import math

from torch import Tensor

from diffusers_curriculum.checks import above_zero
from diffusers_curriculum.weighting.conversion import softplus, to_target
from diffusers_curriculum.weighting.formulas import register

_MAX_LOG_SNR = math.log(1000)  # both code bases clip S there for "debiased"


@register(
    "debiased_kohya",
    formula="W_v = 1 / (1 + S), W_eps = 1 / sqrt S, S clipped at 1000",
    source="kohya-ss/sd-scripts, --debiased_estimation_loss",
    families="vp",
    note="epsilon and v only; on v it is unit_sample, not the paper's weight (debiased)",
)
def debiased_kohya(log_snr: Tensor, *, prediction_type: str) -> Tensor:
    """log of the W_x0 behind 1 / (1 + S) on v and 1 / sqrt S on epsilon, S clipped at 1000, as in
    kohya-ss/sd-scripts; arXiv 2310.08442 is ``debiased``.

    Raises:
        ValueError: another prediction type.
    """
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
    """log of the W_x0 behind 1 / sqrt(1 + S) on v and 1 / sqrt S on epsilon, S clipped at 1000, as
    in Nerogar/OneTrainer; arXiv 2310.08442 is ``debiased``.

    Raises:
        ValueError: another prediction type.
    """
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
    """log of the W_x0 behind (2 + S)^-gamma on v, as in Nerogar/OneTrainer; arXiv 2204.00227 is
    ``p2``, which is also what that code base does for epsilon.

    Raises:
        ValueError: another prediction type, or gamma not greater than 0.
    """
    above_zero("gamma", gamma)
    log_two = math.log(2)
    weights = {"v_prediction": -gamma * (log_two + softplus(log_snr - log_two))}
    return _on_x0("p2_onetrainer", weights, log_snr, prediction_type, "p2")


def _on_x0(
    name: str, weights: dict[str, Tensor], log_snr: Tensor, prediction_type: str, instead: str
) -> Tensor:
    if prediction_type not in weights:
        raise ValueError(
            f"loss weighting {name!r} is defined for {' and '.join(weights)} only, not for "
            f"prediction_type={prediction_type!r}: use {instead}, which is defined for all."
        )
    return weights[prediction_type] - to_target(prediction_type, log_snr)
