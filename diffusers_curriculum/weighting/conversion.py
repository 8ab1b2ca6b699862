"""The weight on one target's squared error as the weight on another's, in log space.

    W_epsilon = W_x0 / S,   W_v = W_x0 / (1 + S),   W_flow = W_x0 / (1 + sqrt S)^2

with S = exp(log_snr): the squared errors of one wrong x0, seen as epsilon, v and flow, stand in the
inverse ratio. The limits at S = 0 and S = infinity come out by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Beyond it exp() is 0 or infinite in float64 for every weight, which is the limit wanted.
_INFINITY = 1e4


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), to full precision (torch's own turns linear above 20)."""
    return -logsigmoid(-x)


# log of (weight on the target / weight on x0), by prediction type
TO_TARGET: dict[str, Callable[[Tensor], Tensor]] = {
    "sample": torch.zeros_like,
    "epsilon": lambda log_snr: -log_snr,
    "v_prediction": lambda log_snr: -softplus(log_snr),
    "flow": lambda log_snr: -2 * softplus(log_snr / 2),
}


def bounded(log_snr: Tensor) -> Tensor:
    """``log_snr`` in float64, its infinities replaced by numbers that stand for them."""
    return log_snr.double().clamp(-_INFINITY, _INFINITY)
