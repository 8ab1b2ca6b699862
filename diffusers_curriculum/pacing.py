"""When a curriculum opens its next cluster.

A pacing is a frozen rule; what changes is a small state that the sampler keeps with the losses: as
0-dim tensors on a device, so that a step costs no host synchronisation; as plain numbers on a CPU,
where tensors cost more than what they hold.  A rule is written once for both.  Stages count from 1.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.checks import check_fields, checked, inside, not_negative, whole

State = dict[str, Any]
# Mean length of a stage on a plateau, in units of patience, for any continuous law of losses:
# e^gamma, gamma = Euler's constant (records of an exchangeable sequence).
PLATEAU_STAGE = math.exp(0.5772156649015329)


def _lerp_numbers(start: float, end: float, weight: float) -> float:
    # torch's own, which may round once where Python's arithmetic rounds twice
    first, last = (torch.scalar_tensor(value, dtype=torch.float64) for value in (start, end))
    return torch.lerp(first, last, weight).item()


# what a rule needs besides operators, for tensors and for numbers: where, lerp, isfinite
_OF_TENSORS = torch.where, torch.lerp, torch.isfinite
_OF_NUMBERS = (lambda c, yes, no: yes if c else no), _lerp_numbers, math.isfinite


@dataclass(frozen=True)
class Pacing:
    """Base of all pacings; parameters are fields, checked when it is built."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """As it is registered."""
        return PACINGS.name_of(type(self))

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

    def planned_starts(self, stages: int, steps: int) -> list[float]:
        """The step at which each of the stages begins, as far as a run of ``steps`` gets (on a
        loss plateau, where losses decide); those that it does not get to begin after its end."""
        if self.initial_state():
            return [float(self.expected_steps(stage)) for stage in range(1, stages + 1)]
        reached = [int(self.stage({}, step, stages)) for step in range(steps + 1)]
        return [float(bisect_left(reached, stage)) for stage in range(1, stages + 1)]


PACINGS: Catalogue[type[Pacing]] = Catalogue("pacing")


@PACINGS.register(
    "patience",
    formula="next stage after `patience` steps without a new best loss",
    source="arXiv 2403.10348",
)
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

    patience: int = checked(whole, 1, default=200)
    min_delta: float = checked(not_negative, default=0.0)
    smoothing: float = checked(inside, 0, 1, "[)", default=0.0)
    min_stage_steps: int = checked(whole, default=0)
    max_stage_steps: int | None = checked(whole, 1, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_stage_steps is not None:
            whole("max_stage_steps", self.max_stage_steps, self.min_stage_steps)

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


@PACINGS.register("fixed", formula="n = 1 + floor(step / stage_steps)")
@dataclass(frozen=True)
class FixedPacing(Pacing):
    """Next stage every ``stage_steps`` optimizer steps."""

    stage_steps: int = checked(whole, 1, default=1000)

    def stage(self, state: State, step: int, stages: int) -> int:
        return min(stages, 1 + step // self.stage_steps)

    def expected_steps(self, stages: int) -> float:
        return (stages - 1) * self.stage_steps


@dataclass(frozen=True)
class TotalStepsPacing(Pacing):
    """Stage 1 + floor((stages - 1) f(step / total_steps)): everything is open from step
    ``total_steps`` on."""

    total_steps: int = checked(whole, 1, default=10000)
    _shape: ClassVar[Callable[[float], float]]

    def stage(self, state: State, step: int, stages: int) -> int:
        if step >= self.total_steps:
            return stages
        opened = (stages - 1) * self._shape(step / self.total_steps)
        return 1 + math.floor(opened + 1e-9)  # 49 * (1 / 49) is below 1 in floating point

    def expected_steps(self, stages: int) -> float:
        return self.total_steps


@PACINGS.register("linear", formula="f(p) = p")
@dataclass(frozen=True)
class LinearPacing(TotalStepsPacing):
    """Evenly."""

    _shape = staticmethod(lambda progress: progress)


@PACINGS.register("cosine", formula="f(p) = (1 - cos(pi p)) / 2")
@dataclass(frozen=True)
class CosinePacing(TotalStepsPacing):
    """Slow at both ends."""

    _shape = staticmethod(lambda progress: (1 - math.cos(math.pi * progress)) / 2)


@PACINGS.register("root", formula="f(p) = sqrt(p)")
@dataclass(frozen=True)
class RootPacing(TotalStepsPacing):
    """Most stages early."""

    _shape = staticmethod(math.sqrt)


def make_pacing(name: str, /, **parameters: Any) -> Pacing:
    """Build the pacing called ``name``.

    Raises:
        ValueError: unknown name or parameter (the message lists the known ones), or a parameter
            out of range.
    """
    kind = PACINGS.look_up(name)
    PACINGS.check_parameters(name, parameters, (f.name for f in fields(kind)))
    return kind(**parameters)
