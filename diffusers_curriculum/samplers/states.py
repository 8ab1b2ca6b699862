"""States of samplers, those of older versions too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusers_curriculum.samplers.statistics import State, Statistics

if TYPE_CHECKING:
    from diffusers_curriculum.samplers.base import TimestepSampler


def part_of(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The state of a sampler inside another, whose keys begin with ``prefix`` there."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def upgraded_part(
    sampler: TimestepSampler, state: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """The entries of ``state`` that are of a sampler inside another, in the form of today."""
    own = sampler.upgraded(part_of(state, prefix))
    return {prefix + name: value for name, value in own.items()}


def upgraded_averages(
    state: Mapping[str, Any], statistics: Statistics, factor: Tensor
) -> dict[str, Any]:
    """The state of a law that learns, in the form of today.

    Once it was learned everywhere or nowhere, and what was observed was averaged without its
    ``factor`` (T,).
    """
    found, own = dict(state), part_of(state, "state.")
    learned = torch.as_tensor(own.get("learned", [False]))
    if learned.ndim or starts_of(state) != list(statistics.starts):
        return found
    if bool((factor != 1).any()):
        own = statistics.rescaled(own, factor) | {"profile": own["profile"] * factor}
    own["learned"] = learned.repeat(len(statistics.starts))
    return found | {f"state.{name}": value for name, value in own.items()}


def check_fits(state: Mapping[str, Any], statistics: Statistics, own: State) -> None:
    """Raise ValueError for a state of other bins than those of ``statistics``, or of other shapes
    than ``own``."""
    starts, mine = starts_of(state), list(statistics.starts)
    if starts and starts != mine:
        raise ValueError(
            f"the state has {len(starts)} bins starting at {starts[:4]}..., this sampler "
            f"{len(mine)} at {mine[:4]}...: build it from the same config and scheduler."
        )
    for name, value in own.items():
        shape = torch.as_tensor(state.get(f"state.{name}", value)).shape
        if shape != value.shape:
            raise ValueError(
                f"the state's {name} has shape {tuple(shape)}, this sampler's "
                f"{tuple(value.shape)}: build it from the same config and scheduler."
            )


def starts_of(state: Mapping[str, Any]) -> list[int]:
    """First level of each bin or cluster; empty where the state does not tell."""
    return torch.as_tensor(state.get("starts", [])).tolist()
