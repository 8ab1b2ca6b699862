"""The weight on one target's squared error as the weight on another's, in log space.

    W_epsilon = W_x0 / S,   W_v = W_x0 / (1 + S),   W_flow = W_x0 / (1 + sqrt S)^2,
    W_edm = W_x0 / (S + 1 / sigma_data^2)

with S = exp(log_snr): the squared errors of one wrong x0, seen as epsilon, v, flow and EDM's F
(arXiv 2206.00364), stand in the inverse ratio. The limits at S = 0 and S = infinity come out by
themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusers_curriculum.checks import one_of

# Beyond it exp() is 0 or infinite in float64 for every weight, which is the limit wanted.
_INFINITY = 1e4


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
