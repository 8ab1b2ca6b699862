"""The laws of diffusers' ``compute_density_for_timestep_sampling``, through inverse cdfs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # where the mode law's quantile function is monotone


def logit_normal(w: Tensor, mean: float | None, std: float | None) -> Tensor:
    """u = sigmoid(mean + std z), z standard normal (arXiv 2403.03206, in diffusers' clock).

    u counts from the noisy end, so that mean > 0 favours clean levels.

    Raises:
        ValueError: no mean, or a standard deviation that is not greater than 0.
    """
    if mean is None or not math.isfinite(mean) or std is None or not 0 < std < math.inf:
        raise ValueError(
            f"'logit_normal' needs a finite logit_mean (got {mean!r}) and a logit_std greater than "
            f"0 (got {std!r}); diffusers' scripts use 0.0 and 1.0."
        )
    return torch.sigmoid(mean + std * torch.special.ndtri(w))


def mode(w: Tensor, scale: float | None) -> Tensor:
    """u = 1 - w - scale (cos^2(pi w / 2) - 1 + w) (arXiv 2403.03206).

    Raises:
        ValueError: no scale, or one for which u is no quantile function and may leave [0, 1].
    """
    if scale is None or not MODE_SCALES[0] <= scale <= MODE_SCALES[1]:
        raise ValueError(
            f"'mode' needs a mode_scale from {MODE_SCALES[0]} to {MODE_SCALES[1]:.4f} (got "
            f"{scale!r}); diffusers' scripts use 1.29."
        )
    return 1 - w - scale * (torch.cos(math.pi * w / 2).square() - 1 + w)
