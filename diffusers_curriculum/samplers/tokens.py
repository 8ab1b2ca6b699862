"""A noise level for each token or frame of a sample, and how those of one sample are arranged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.checks import whole
from diffusers_curriculum.randomness import Slots, batch_uniforms

ARRANGEMENTS: Catalogue[Callable[[Tensor, Callable[[str], Tensor]], Tensor]] = Catalogue(
    "arrangement"
)
"""How the levels of one sample's tokens are arranged: (u, more) -> (B, N), of the numbers ``u``
(B, N) of the tokens, and of ``more(purpose)``, a further one (B,) for each sample."""


def token_uniforms(
    draw: str,
    batch: int | Slots,
    tokens: int,
    arrangement: str = "independent",
    *,
    seed: int,
    step: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, tokens) float64 numbers in (0, 1) for an inverse cdf, 0 = cleanest; on the CPU. Strata
    are those of all tokens of the global batch.

    Args:
        draw, batch, seed, step, generator: as of :func:`~diffusers_curriculum.randomness.uniforms`.
        arrangement: "independent" (arXiv 2407.01392), "monotone": no cleaner than the token before
            (arXiv 2503.07418), or "leading": one token, any, has the level that is drawn, the
            others cleaner ones.

    Raises:
        ValueError: no tokens, or an unknown arrangement.
    """
    whole("tokens", tokens, 1)
    arrange = ARRANGEMENTS.look_up(arrangement)
    slots = batch if isinstance(batch, Slots) else Slots.here(batch)
    each = Slots(slots.start * tokens, slots.count * tokens, slots.total * tokens)
    own = {"seed": seed, "step": step, "generator": generator}
    u = batch_uniforms(draw, each, **own).view(slots.count, tokens)
    return arrange(u, lambda purpose: batch_uniforms(draw, slots, purpose=purpose, **own))


@ARRANGEMENTS.register("independent", formula="u_k", source="arXiv 2407.01392")
def _independent(u: Tensor, more: Callable[[str], Tensor]) -> Tensor:
    return u


@ARRANGEMENTS.register("monotone", formula="u_(1) <= ... <= u_(N)", source="arXiv 2503.07418")
def _monotone(u: Tensor, more: Callable[[str], Tensor]) -> Tensor:
    return u.sort(-1).values


@ARRANGEMENTS.register("leading", formula="u_j = u, u_k = u w_k: one noisy token, any")
def _leading(u: Tensor, more: Callable[[str], Tensor]) -> Tensor:
    level = more("leading token")[:, None]
    place = (more("leading place") * u.shape[-1]).long()[:, None]
    return (u * level).scatter(-1, place, level)
