"""The parts of a run's state that are neither model nor optimizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from diffusers_curriculum.training.storage.manifest import CheckpointError

POWER_EMA = "tracker_power_ema"


class Stateful(Protocol):
    """Anything whose state is tensors, plain numbers, strings, and lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def starts_afresh(name: str, renew: Collection[str]) -> bool:
    """Whether a part is not to be taken from the checkpoint; "trackers" means all of them but the
    averaged weights, which are no statistics."""
    statistics = name.startswith("tracker_") and name != POWER_EMA
    return name in renew or ("trackers" in renew and statistics)


def load_part(part: Stateful, state: dict[str, Any], name: str) -> None:
    """Give a part its state back.

    Raises:
        CheckpointError: it refuses the state; the message has its name.
    """
    try:
        part.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint's {name} does not fit this run: {error}") from error
