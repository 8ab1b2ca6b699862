"""How far a reconstruction is from its image."""

from __future__ import annotations

import torch
from torch import Tensor

_EDGE = 0.1  # epsilon of arXiv 2102.12092, appendix A.3


def logit_laplace_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean negative log-likelihood under a logit-Laplace law (arXiv 2102.12092; in 2110.04627).

    If logit(y) has a Laplace law of centre m and width b, then y in (0, 1) has the density

        f(y) = exp(-|logit(y) - m| / b) / (2 b y (1 - y))

    because d logit(y) / dy = 1 / (y (1 - y)). Pixels x in [-1, 1] are moved off the ends of (0, 1)
    by y = (1 - 2 e) (x + 1) / 2 + e with e = 0.1. A decoder with one output per pixel gives the
    median and no width: m = logit(y of the reconstruction), b = 1. What is left of -log f, without
    the terms that do not depend on the reconstruction, is

        mean |logit(y) - logit(y_reconstruction)|

    Args:
        reconstruction, images: (B, C, H, W) in [-1, 1]; the first may leave this range, and no
            gradient comes from where it leaves it by more than 0.2.
    """
    return (_logit(reconstruction.float()) - _logit(images.float())).abs().mean()


def _logit(pixels: Tensor) -> Tensor:
    inner = (1 - 2 * _EDGE) * (pixels.clamp(-1.2, 1.2) + 1) / 2 + _EDGE
    return torch.logit(inner)


def squared_errors(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error (B,) of images in [-1, 1], the reconstruction clipped to that."""
    error = reconstruction.float().clamp(-1, 1) - images.float()
    return error.square().flatten(1).mean(1)


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels: 10 log10(2^2 / mean squared error), pixels in
    [-1, 1] having the peak-to-peak range 2."""
    return 10 * torch.log10(4.0 / squared_error)
