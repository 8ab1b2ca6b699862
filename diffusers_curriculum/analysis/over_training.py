"""Which law a sampler draws from at which step of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.samplers import CurriculumTimestepSampler, TimestepSampler
from diffusers_curriculum.samplers.adaptive import AdaptiveTimestepSampler
from diffusers_curriculum.samplers.composition import compose
from diffusers_curriculum.samplers.sequence import SequenceTimestepSampler
from diffusers_curriculum.samplers.stages import Stages, restrict

MOMENTS = 64  # at which a law that changes with the step is looked at


@dataclass(frozen=True, eq=False)
class OverTraining:
    """The laws of a run, one after the other.

    Attributes:
        starts: (n,) optimizer step from which each law holds; fractions where it is an expectation.
        masses: (n, T) float64, each row sums to 1.
        steps: length of the run.
        how: how the starts are known, as a short text; empty where nothing changes.
    """

    starts: np.ndarray
    masses: np.ndarray
    steps: int
    how: str

    @property
    def average(self) -> np.ndarray:
        """(T,) the mass that a step of the run draws from on average."""
        durations = np.diff(np.append(self.starts, self.steps))
        return durations @ self.masses / durations.sum()


def over_training(sampler: TimestepSampler, steps: int) -> OverTraining:
    """The laws that ``sampler`` draws from in a run of ``steps`` optimizer steps.

    A curriculum's stages begin where they are planned, or, once it has seen losses, where they
    opened. A law that changes with the step is looked at ``MOMENTS`` times; one that learns is
    shown as it is now.
    """
    starts, how = _stage_starts(sampler, steps)
    moments = starts[(starts >= 0) & (starts < steps)]
    moments = np.union1d(moments, _moments_of_change(sampler, steps))
    rows = [mass_at(sampler, int((starts <= at).sum()), int(at))[0].numpy() for at in moments]
    masses, keep = np.stack(rows), np.ones(len(rows), dtype=bool)
    keep[1:] = (masses[1:] != masses[:-1]).any(1)
    return OverTraining(moments[keep], masses[keep], steps, how)


def mass_at(
    sampler: TimestepSampler, stage: int | None = None, step: int | None = None
) -> tuple[Tensor, Tensor]:
    """(T,) mass and (T,) importance at optimizer step ``step``, in stage ``stage`` of a curriculum
    (None: with everything open); nothing of the sampler's state changes."""
    if not isinstance(sampler, CurriculumTimestepSampler):
        return sampler.probabilities(step), sampler.importance(step)
    cpu, base = torch.device("cpu"), sampler.base
    at = 0 if step is None else step
    arguments = sampler.starts, len(sampler.levels), sampler.order, sampler.within, sampler.seed
    stages = Stages.of(*arguments)
    opened = stages.opened[(len(stages) if stage is None else max(stage, 1)) - 1]
    law = restrict(stages.spread(base.law(at, cpu)), opened)
    reference = restrict(base.reference(at, cpu), opened)
    return compose(law, reference, sampler.floor, sampler.exponent)


def _moments_of_change(sampler: TimestepSampler, steps: int) -> np.ndarray:
    """Steps at which to look at a law that changes with the step."""
    law = sampler.base if isinstance(sampler, CurriculumTimestepSampler) else sampler
    if law.static_law or isinstance(law, AdaptiveTimestepSampler):
        return np.zeros(1)
    moments = np.linspace(0, steps, MOMENTS, endpoint=False).round()
    if isinstance(law, SequenceTimestepSampler):
        moments = np.union1d(moments, [start for start in law.starts if start < steps])
    return moments


def _stage_starts(sampler: TimestepSampler, steps: int) -> tuple[np.ndarray, str]:
    """(stages,) the step at which each stage begins (-1: it did not), and how that is known."""
    if not isinstance(sampler, CurriculumTimestepSampler):
        return np.zeros(1), "as learned so far" if _learns(sampler) else ""
    if int(sampler.cluster_counts.sum()):
        opened = sampler.opened_at.double().numpy()
        return np.where(opened < 0, np.inf, opened), "stages as they opened"
    patient = sampler.pacing.name == "patience"
    how = "stages as on a loss plateau" if patient else "stages as planned"
    return np.fromiter(_planned_starts(sampler, steps), dtype=float), how


def _learns(sampler: TimestepSampler) -> bool:
    return isinstance(sampler, AdaptiveTimestepSampler) or any(
        _learns(phase) for phase in getattr(sampler, "samplers", ())
    )


def _planned_starts(sampler: CurriculumTimestepSampler, steps: int) -> Iterator[float]:
    stages = range(1, sampler.stages + 1)
    if sampler.pacing.name in ("patience", "fixed"):
        yield from (float(sampler.pacing.expected_steps(stage)) for stage in stages)
        return
    reached = [int(sampler.pacing.stage({}, step, sampler.stages)) for step in range(steps + 1)]
    yield from np.searchsorted(reached, list(stages)).astype(float)
