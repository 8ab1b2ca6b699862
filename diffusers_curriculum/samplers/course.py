"""Where a law that moves is at each step of a run: its places, and when it is at which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from diffusers_curriculum.checks import above_zero, finite, inside, whole
from diffusers_curriculum.densities import placement_of, portable_parameters
from diffusers_curriculum.pacing import PACINGS, Pacing, TotalStepsPacing, make_pacing
from diffusers_curriculum.samplers.description import arguments_in_words

# The settings that a way is told by.
WAY = (
    *("location_start", "location_end", "scale_start", "scale_end", "positions"),
    *("move_steps", "widen_steps", "pacing", "pacing_args"),
)
MOST = 256
SMOOTH, STAGES = 64, 20  # positions by default


@dataclass(frozen=True)
class Course:
    """The places of a law: ``positions`` of them while it moves, and as many while it widens, the
    first of which is the last of those.

    Attributes:
        location: (start, end), in log-SNR.
        scale: (start, end), in log-SNR; None of a law that has none.
        pacing: when the next position is taken, as a curriculum opens its next cluster.
        positions: at equal distances.
        widen_steps: optimizer steps in which it widens; 0 where it does not.
    """

    location: tuple[float, float]
    scale: tuple[float, float] | None
    pacing: Pacing
    positions: int
    widen_steps: int

    def __len__(self) -> int:
        return self.positions + (self.positions - 1 if self.widen_steps else 0)

    @classmethod
    def of(
        cls,
        location: tuple[float, float],
        scale: tuple[float, float] | None,
        pacing: Pacing,
        positions: int | None,
        widen_steps: int,
    ) -> Course:
        """The checked course; ``positions`` by default 64, or 20 where the pacing has stages."""
        finite("location_start", location[0])
        finite("location_end", location[1])
        whole("widen_steps", widen_steps)
        if positions is None:
            positions = SMOOTH if isinstance(pacing, TotalStepsPacing) else STAGES
        whole("positions", positions, 2, MOST)
        return cls(location, scale, pacing, positions, widen_steps)

    @cached_property
    def arrival(self) -> int:
        """The step at which it is at its last position, where that follows from the step alone."""
        return math.ceil(self.pacing.expected_steps(self.positions))

    @property
    def ends(self) -> tuple[int, ...]:
        """The places where it begins, arrives and, where it widens, ends."""
        return tuple(dict.fromkeys((0, self.positions - 1, len(self) - 1)))

    @property
    def move_steps(self) -> int | None:
        """In which it moves; None where it does so stage by stage."""
        return self.pacing.total_steps if isinstance(self.pacing, TotalStepsPacing) else None

    def at(self, place: int) -> tuple[float, float | None]:
        """Location and scale at a place, counted from 0."""
        last = self.positions - 1
        moved, widened = min(place, last) / last, max(place - last, 0) / last
        scale = None if self.scale is None else _between(self.scale, widened)
        return _between(self.location, moved), scale

    def place(self, stage: Any, since: Any) -> Any:
        """The place in ``stage`` of the pacing, ``since`` steps after the last one began (below 0:
        before); numbers, or tensors on a device."""
        if not self.widen_steps:
            return stage - 1
        further = since * (self.positions - 1) // self.widen_steps
        last = self.positions - 1
        if isinstance(further, Tensor):
            return stage - 1 + further.clamp(0, last)
        return stage - 1 + max(0, min(further, last))

    def widening_starts(self, arrived: float) -> list[float]:
        """The steps at which it takes the places after its last position, where it is from
        ``arrived`` on."""
        places = range(1, len(self) - self.positions + 1)
        return [arrived + -(-n * self.widen_steps // (self.positions - 1)) for n in places]


def move_pacing(name: str, parameters: Mapping[str, Any], move_steps: int | None) -> Pacing:
    """The pacing called ``name``; over ``move_steps`` where it has a number of steps.

    Raises:
        ValueError: unknown names, numbers out of range, or ``move_steps`` of another pacing.
    """
    if not issubclass(PACINGS.look_up(name), TotalStepsPacing):
        if move_steps is not None:
            raise ValueError(
                f"move_steps={move_steps!r} has no effect with pacing={name!r}, which moves stage "
                "by stage: leave it out, and say how long a stage is in pacing_args."
            )
        return make_pacing(name, **parameters)
    if "total_steps" in parameters:
        raise ValueError(
            f"pacing_args has total_steps={parameters['total_steps']!r}: say move_steps instead."
        )
    if move_steps is None:
        return make_pacing(name, **parameters)
    whole("move_steps", move_steps, 1)
    return make_pacing(name, **parameters, total_steps=move_steps)


def checked_scales(
    density: str, scale: tuple[float | None, float | None], widen_steps: int
) -> tuple[float, float] | None:
    """The scale at the start and the end, by default 1 and twice that; None of a law without one.

    Raises:
        ValueError: a number out of range, or one without effect.
    """
    whole("widen_steps", widen_steps)
    start, end = scale
    if placement_of(density).scale is None:
        given = {"scale_start": start, "scale_end": end, "widen_steps": widen_steps or None}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} has no effect: density {density!r} has no scale to set."
                )
        return None
    if end is not None and not widen_steps:
        raise ValueError(f"scale_end={end!r} has no effect with widen_steps=0: give widen_steps.")
    start = 1.0 if start is None else start
    above_zero("scale_start", start)
    end = 2 * start if end is None else end
    above_zero("scale_end", end)
    return start, end


def other_parameters(density: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a density that its course does not set, as plain values; ValueError for one
    that it does."""
    placement = placement_of(density)
    own = {placement.location, placement.scale, *placement.fixed} & given.keys()
    for name in sorted(filter(None, own)):
        raise ValueError(
            f"density_args has {name}={given[name]!r}, which changes over the run: say where with "
            "location_start, location_end, scale_start and scale_end."
        )
    return portable_parameters(density, given)


def steps_of_run(arguments: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """``arguments`` with ``move_share`` and ``widen_share`` of a run of ``steps`` (None: not known)
    as ``move_steps`` and ``widen_steps``.

    Raises:
        ValueError: no number of steps to move in, both it and a share, a share out of range, or
            one of a run of unknown length.
    """
    found = dict(arguments)
    for what in ("move", "widen"):
        if (name := f"{what}_share") in found:
            found |= {f"{what}_steps": _steps_of(name, found.pop(name), found, steps)}
    kind = PACINGS.look_up(found.get("pacing", "root"))
    if issubclass(kind, TotalStepsPacing) and "move_steps" not in found:
        raise ValueError(
            "moving needs the steps in which its location moves: move_steps=N, or move_share=0.25 "
            "for that share of a run of known length."
        )
    return found


def way_in_words(config: Mapping[str, Any]) -> str:
    """A config's way: ``location -1 to 2 in 1500 steps (root), then scale 1 to 2 in 12000``."""
    by = f"{config.get('pacing')}{arguments_in_words(config.get('pacing_args'))}"
    steps, scale, end = (config.get(name) for name in ("move_steps", "scale_start", "scale_end"))
    told = f"location {config['location_start']:g} to {config['location_end']:g} "
    told += f"by {by}" if steps is None else f"in {steps} steps ({by})"
    if end is not None:
        return f"{told}, then scale {scale:g} to {end:g} in {config['widen_steps']}"
    return told if scale is None else f"{told}, scale {scale:g}"


def _steps_of(name: str, share: Any, found: Mapping[str, Any], steps: int | None) -> int:
    inside(name, share, 0, 1, "(]")
    twice = name.replace("share", "steps")
    if twice in found:
        raise ValueError(
            f"{name}={share!r} and {twice}={found[twice]!r} both say how long: drop one of the two."
        )
    if steps is None:
        raise ValueError(f"{name}={share!r} needs the length of the run: give --max_train_steps N.")
    return max(1, round(share * steps))


def _between(ends: tuple[float, float], share: float) -> float:
    """``share`` of the way between two numbers, both ends exact."""
    start, end = ends
    return end if share == 1 else start + share * (end - start)
