"""What a ``weighting_scheme`` names: diffusers' scripts pass one and the same to two functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.weighting import WEIGHTINGS

OFFICIAL_DENSITIES = ("logit_normal", "mode")
OFFICIAL_WEIGHTINGS = ("sigma_sqrt", "cosmap")


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
    registry = {"density": DENSITIES, "weighting": WEIGHTINGS}.get(prefix if colon else "", {})
    if bare in registry:
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


def _of_the_catalogue(name: str) -> Scheme:
    kinds = [
        kind
        for kind, registry in (("density", DENSITIES), ("weighting", WEIGHTINGS))
        if name in registry
    ]
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
