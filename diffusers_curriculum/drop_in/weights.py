"""``compute_loss_weighting_for_sd3`` for every loss weighting of this library."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import training_utils
from torch import Tensor

from diffusers_curriculum.drop_in.names import refuse_parameters, scheme
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.weighting import loss_weights


def compute_loss_weighting_for_sd3(
    weighting_scheme: str,
    sigmas: Tensor | None = None,
    *,
    prediction_type: str = "flow",
    **parameters: Any,
) -> Tensor:
    """Weight of each sample's squared error under flow matching, x = (1 - sigma) x0 + sigma noise.

    "sigma_sqrt" and "cosmap" are diffusers' own, bit for bit; "none", and what names a density, is
    1. A loss weighting of this library is taken at the log-SNR 2 ln((1 - sigma) / sigma); where
    that is infinite the weight is its limit.

    Args:
        weighting_scheme: a name; "weighting:" before it skips diffusers' meaning.
        sigmas: any shape, in [0, 1].
        prediction_type: whose error is weighed: "flow" (noise - x0), or "sample" where a script
            turns the network's output into x0 first (``--precondition_outputs`` of SD3's).
        parameters: of a loss weighting of this library.

    Returns:
        The shape of ``sigmas``, on its device; float32 for weightings of this library.

    Raises:
        ValueError: no sigmas or one outside [0, 1], unknown names or parameters, or a weight that
            is infinite.
    """
    found = scheme(weighting_scheme)
    if sigmas is None or not bool(((sigmas >= 0) & (sigmas <= 1)).all()):
        raise ValueError(f"sigmas={sigmas!r} must be a tensor of numbers from 0 to 1.")
    if found.kind == "weighting":
        return _of_this_library(found.name, sigmas, prediction_type, parameters)
    refuse_parameters(found, parameters)
    name = found.name if found.kind == "official weighting" else "none"
    weights = training_utils.compute_loss_weighting_for_sd3(name, sigmas)
    if not bool(weights.isfinite().all()):
        raise ValueError(f"{name!r} is infinite at sigma = {float(sigmas.min())!r}: leave it out.")
    return weights


def _of_this_library(
    name: str, sigmas: Tensor, prediction_type: str, parameters: dict[str, Any]
) -> Tensor:
    sigma = sigmas.detach().cpu().double().flatten()
    alpha = 1 - sigma
    levels = NoiseLevels(
        log_snr=2 * (alpha.log() - sigma.log()),
        alpha=alpha,
        sigma=sigma,
        timesteps=1000 * sigma,
        edges=torch.full((len(sigma) + 1,), torch.nan, dtype=torch.float64),  # not a schedule
        prediction_type="flow",
        family="flow",
    )
    weights = loss_weights(name, levels, prediction_type, **parameters)
    if weights is None:
        return torch.ones_like(sigmas, dtype=torch.float32)
    return weights.reshape(sigmas.shape).to(sigmas.device)
