"""What a ``weighting_scheme`` names, diffusers' own laws among them, and the loss weight it means:
diffusers' scripts pass one and the same name to two functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import training_utils
from torch import Tensor

from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.densities.time_laws import MODE_SCALES
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.weighting import WEIGHTINGS, loss_weights

OFFICIAL_DENSITIES = ("logit_normal", "mode")
OFFICIAL_WEIGHTINGS = ("sigma_sqrt", "cosmap")

_CATALOGUES: dict[str, Catalogue[Any]] = {"density": DENSITIES, "weighting": WEIGHTINGS}


class Scheme(NamedTuple):
    """A name and what it stands for.

    Attributes:
        kind: "density" or "weighting" of this library, "official density" or "official weighting"
            of diffusers, or "none".
        name: without its prefix.
    """

    kind: str
    name: str


def scheme(weighting_scheme: str) -> Scheme:
    """Look up a name: first diffusers' own, then the densities and the loss weightings.

    "density:" or "weighting:" before a name skips diffusers' own meaning of it. A ValueError says
    that it is unknown, or both a density and a weighting.
    """
    prefix, colon, bare = str(weighting_scheme).partition(":")
    if colon and bare in _CATALOGUES.get(prefix, ()):
        return Scheme(prefix, bare)
    if weighting_scheme == "none":
        return Scheme("none", "none")
    if weighting_scheme in OFFICIAL_DENSITIES:
        return Scheme("official density", weighting_scheme)
    if weighting_scheme in OFFICIAL_WEIGHTINGS:
        return Scheme("official weighting", weighting_scheme)
    kinds = [kind for kind, known in _CATALOGUES.items() if weighting_scheme in known]
    if len(kinds) == 1:
        return Scheme(kinds[0], weighting_scheme)
    name = weighting_scheme
    if kinds:
        raise ValueError(
            f"{name!r} is both a density and a loss weighting: say 'density:{name}' or "
            f"'weighting:{name}'."
        )
    raise ValueError(
        f"weighting_scheme={name!r} is unknown: choose from diffusers' none, "
        f"{', '.join(OFFICIAL_DENSITIES + OFFICIAL_WEIGHTINGS)}, the densities "
        f"{', '.join(sorted(DENSITIES))}, or the loss weightings {', '.join(sorted(WEIGHTINGS))}."
    )


def refuse_parameters(found: Scheme, parameters: Mapping[str, object]) -> None:
    """Raise ValueError for parameters where the scheme takes none."""
    if parameters:
        raise ValueError(
            f"{found.name!r} ({found.kind}) takes no parameter {sorted(parameters)[0]!r} here."
        )


def logit_normal(w: Tensor, mean: float | None, std: float | None) -> Tensor:
    """u = sigmoid(mean + std z), z standard normal (arXiv 2403.03206, in diffusers' clock).

    u counts from the noisy end, so that mean > 0 favours clean levels. A ValueError refuses a
    missing mean, and a standard deviation that is not greater than 0.
    """
    if mean is None or not math.isfinite(mean) or std is None or not 0 < std < math.inf:
        raise ValueError(
            f"'logit_normal' needs a finite logit_mean (got {mean!r}) and a logit_std greater than "
            f"0 (got {std!r}); diffusers' scripts use 0.0 and 1.0."
        )
    return torch.sigmoid(mean + std * torch.special.ndtri(w))


def mode(w: Tensor, scale: float | None) -> Tensor:
    """u = 1 - w - scale (cos^2(pi w / 2) - 1 + w) (arXiv 2403.03206); a ValueError refuses a scale
    for which u is no quantile function and may leave [0, 1], and a missing one."""
    if scale is None or not MODE_SCALES[0] <= scale <= MODE_SCALES[1]:
        raise ValueError(
            f"'mode' needs a mode_scale from {MODE_SCALES[0]} to {MODE_SCALES[1]:.4f} (got "
            f"{scale!r}); diffusers' scripts use 1.29."
        )
    return 1 - w - scale * (torch.cos(math.pi * w / 2).square() - 1 + w)


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
