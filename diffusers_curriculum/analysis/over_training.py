"""The laws of a run, one after the other, before it begins or as they were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusers_curriculum.samplers import TimestepSampler

QUARTERS = 4


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

    @property
    def course(self) -> dict[int, np.ndarray]:
        """(T,) the law at the first step, after each quarter and at the last step, by the step; of
        those that are alike the first, so that a law that stays is there once."""
        found: dict[int, np.ndarray] = {}
        for number in range(QUARTERS + 1):
            step = min(round(number * self.steps / QUARTERS), self.steps - 1)
            mass = self.masses[int((self.starts <= step).sum()) - 1]
            if not any(np.array_equal(mass, other) for other in found.values()):
                found[step] = mass
        return found


def over_training(sampler: TimestepSampler, steps: int) -> OverTraining:
    """The laws that ``sampler`` draws from in a run of ``steps`` optimizer steps.

    A curriculum's stages begin where they are planned, or, once it has seen losses, where they
    opened. A law that changes with the step is looked at now and then, one that learns as it is.
    """
    begin, how = sampler.stage_starts(steps)
    starts = np.asarray(begin)
    moments = np.union1d(starts[starts < steps], sampler.moments(steps))
    rows = [sampler.at_stage(int((starts <= at).sum()), int(at))[0].numpy() for at in moments]
    masses, keep = np.stack(rows), np.ones(len(rows), dtype=bool)
    keep[1:] = (masses[1:] != masses[:-1]).any(1)
    return OverTraining(moments[keep], masses[keep], steps, how)
