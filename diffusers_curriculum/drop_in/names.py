"""What a ``weighting_scheme`` names, diffusers' own laws among them: its scripts pass one and the
same to two functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.weighting import WEIGHTINGS

OFFICIAL_DENSITIES = ("logit_normal", "mode")
OFFICIAL_WEIGHTINGS = ("sigma_sqrt", "cosmap")
MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # where the mode law's quantile function is monotone

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

    "density:" or "weighting:" before a name skips diffusers' own meaning of it.

    Raises:
        ValueError: unknown, or both a density and a weighting.
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
    return _of_the_catalogue(weighting_scheme)


def refuse_parameters(found: Scheme, parameters: Mapping[str, object]) -> None:
    """Raise ValueError for parameters where the scheme takes none."""
    if parameters:
        raise ValueError(
            f"{found.name!r} ({found.kind}) takes no parameter {sorted(parameters)[0]!r} here."
        )


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


def _of_the_catalogue(name: str) -> Scheme:
    kinds = [kind for kind, known in _CATALOGUES.items() if name in known]
    if len(kinds) == 1:
        return Scheme(kinds[0], name)
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
