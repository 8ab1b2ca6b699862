"""When a curriculum opens its next cluster.

A pacing is a frozen rule; what changes is a small state that the sampler keeps with the losses: as
0-dim tensors on a device, so that a step costs no host synchronisation; as plain numbers on a CPU,
where tensors cost more than what they hold.  A rule is written once for both.  Stages count from 1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

State = dict[str, Any]
# Mean length of a stage on a plateau, in units of patience, for any continuous law of losses:
# e^gamma, gamma = Euler's constant (records of an exchangeable sequence).
PLATEAU_STAGE = math.exp(0.5772156649015329)


def _lerp_numbers(start: float, end: float, weight: float) -> float:
    # torch's own, which may round once where Python's arithmetic rounds twice
    first, last = torch.tensor([start, end], dtype=torch.float64)
    return torch.lerp(first, last, weight).item()


# what a rule needs besides operators, for tensors and for numbers: where, lerp, isfinite
_OF_TENSORS = torch.where, torch.lerp, torch.isfinite
_OF_NUMBERS = (lambda c, yes, no: yes if c else no), _lerp_numbers, math.isfinite


@dataclass(frozen=True)
class Pacing:
    """Base of all pacings."""

    name: ClassVar[str]

    def initial_state(self) -> State:
        """The state before the first step; empty where the stage follows from the step alone."""
        return {}

    def observe(self, state: State, loss: Tensor | float, stages: int) -> State:
        """The state after one optimizer step with mean unweighted ``loss``: a 0-dim tensor for a
        state of tensors, a number for a state of numbers."""
        return state

    def stage(self, state: State, step: int, stages: int) -> int | Tensor:
        """The stage, 1 to ``stages``, in which optimizer step ``step`` trains."""
        raise NotImplementedError

    def expected_steps(self, stages: int) -> float:
        """Optimizer steps until the last stage begins (on a loss plateau, for patience)."""
        raise NotImplementedError


@dataclass(frozen=True)
class PatiencePacing(Pacing):
    """Next stage when the loss has not improved for ``patience`` steps (arXiv 2403.10348).

    On a plateau a stage lasts 1.781 patience steps on average, whatever the batch size or the
    scale of the loss.

    Args:
        patience: steps without improvement.
        min_delta: an improvement must exceed it.
        smoothing: decay of an exponential average of the loss, reset at each stage; counting
            starts after 1 / (1 - smoothing) steps.
        min_stage_steps: a stage lasts at least so many steps.
        max_stage_steps: a stage ends after so many steps whatever the loss; None for no cap.
    """

    name: ClassVar[str] = "patience"
    patience: int = 200
    min_delta: float = 0.0
    smoothing: float = 0.0
    min_stage_steps: int = 0
    max_stage_steps: int | None = None

    def __post_init__(self) -> None:
        _check_whole("patience", self.patience, 1)
        _check_whole("min_stage_steps", self.min_stage_steps, 0)
        if self.max_stage_steps is not None:
            _check_whole("max_stage_steps", self.max_stage_steps, max(1, self.min_stage_steps))
        if not self.min_delta >= 0:
            raise ValueError(f"min_delta={self.min_delta!r} must be 0 or more.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing!r} must lie in [0, 1).")

    @property
    def _warm_up(self) -> int:
        # rounded first: 1 / (1 - 0.9) is 10.000000000000002
        return math.ceil(round(1 / (1 - self.smoothing), 6)) if self.smoothing else 0

    def initial_state(self) -> State:
        return {
            "stage": torch.tensor(1),
            "counter": torch.tensor(0),
            "stage_steps": torch.tensor(0),
            "best": torch.tensor(torch.inf, dtype=torch.float64),
            "average": torch.tensor(0.0, dtype=torch.float64),
        }

    def observe(self, state: State, loss: Tensor | float, stages: int) -> State:
        if isinstance(loss, Tensor):
            return self._rule(_OF_TENSORS, state, loss.to(state["average"].dtype), stages)
        return self._rule(_OF_NUMBERS, state, loss, stages)

    def _rule(self, of: tuple[Any, Any, Any], state: State, loss: Any, stages: int) -> State:
        where, lerp, isfinite = of
        steps, average, counter = state["stage_steps"] + 1, loss, state["counter"] + 1
        if self.smoothing:
            average = where(steps == 1, loss, lerp(loss, state["average"], self.smoothing))
        improved = average < state["best"] - self.min_delta
        if self.smoothing:
            counting = steps > self._warm_up
            improved, counter = improved & counting, where(counting, counter, 0)
        counter = where(improved, 0, counter)
        due = (counter >= self.patience) & (steps >= self.min_stage_steps)
        if self.max_stage_steps is not None:
            due = due | (steps >= self.max_stage_steps)
        due = due & (state["stage"] < stages)
        after = {
            "stage": state["stage"] + due,
            "counter": where(due, 0, counter),
            "stage_steps": where(due, 0, steps),
            "best": where(due, torch.inf, where(improved, average, state["best"])),
            "average": average,
        }
        # a non-finite loss is no observation
        finite = isfinite(loss)
        return {name: where(finite, value, state[name]) for name, value in after.items()}

    def stage(self, state: State, step: int, stages: int) -> int | Tensor:
        return state["stage"]

    def expected_steps(self, stages: int) -> float:
        mean = PLATEAU_STAGE * self.patience
        if self.max_stage_steps is not None:
            mean = min(mean, self.max_stage_steps)
        return (stages - 1) * max(mean, self.min_stage_steps)


@dataclass(frozen=True)
class FixedPacing(Pacing):
    """Next stage every ``stage_steps`` optimizer steps."""

    name: ClassVar[str] = "fixed"
    stage_steps: int = 1000

    def __post_init__(self) -> None:
        _check_whole("stage_steps", self.stage_steps, 1)

    def stage(self, state: State, step: int, stages: int) -> int:
        return min(stages, 1 + step // self.stage_steps)

    def expected_steps(self, stages: int) -> float:
        return (stages - 1) * self.stage_steps


@dataclass(frozen=True)
class TotalStepsPacing(Pacing):
    """Stage 1 + floor((stages - 1) f(step / total_steps)): everything is open from step
    ``total_steps`` on."""

    total_steps: int = 10000

    def __post_init__(self) -> None:
        _check_whole("total_steps", self.total_steps, 1)

    @staticmethod
    def _shape(progress: float) -> float:
        raise NotImplementedError

    def stage(self, state: State, step: int, stages: int) -> int:
        if step >= self.total_steps:
            return stages
        opened = (stages - 1) * self._shape(step / self.total_steps)
        return 1 + math.floor(opened + 1e-9)  # 49 * (1 / 49) is below 1 in floating point

    def expected_steps(self, stages: int) -> float:
        return self.total_steps


@dataclass(frozen=True)
class LinearPacing(TotalStepsPacing):
    """f(p) = p."""

    name: ClassVar[str] = "linear"

    @staticmethod
    def _shape(progress: float) -> float:
        return progress


@dataclass(frozen=True)
class CosinePacing(TotalStepsPacing):
    """f(p) = (1 - cos(pi p)) / 2: slow at both ends."""

    name: ClassVar[str] = "cosine"

    @staticmethod
    def _shape(progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class RootPacing(TotalStepsPacing):
    """f(p) = sqrt(p): most stages early."""

    name: ClassVar[str] = "root"

    @staticmethod
    def _shape(progress: float) -> float:
        return math.sqrt(progress)


PACINGS: dict[str, type[Pacing]] = {
    p.name: p for p in (PatiencePacing, FixedPacing, LinearPacing, CosinePacing, RootPacing)
}


def make_pacing(name: str, /, **parameters: Any) -> Pacing:
    """Build the pacing called ``name``.

    Raises:
        ValueError: unknown name or parameter (the message lists the known ones), or a parameter
            out of range.
    """
    if name not in PACINGS:
        raise ValueError(f"pacing {name!r} is unknown: choose from {', '.join(PACINGS)}.")
    known = [f.name for f in fields(PACINGS[name])]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(
            f"pacing {name!r} has no parameter {unknown[0]!r}: it takes {', '.join(known)}."
        )
    return PACINGS[name](**parameters)


def pacing_config(pacing: Pacing) -> dict[str, Any]:
    """The parameters of ``pacing`` as plain values, for :func:`make_pacing`."""
    return asdict(pacing)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more.")
