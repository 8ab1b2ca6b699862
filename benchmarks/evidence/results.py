"""What was measured, as the report and the claims read it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.cells import Cell
from benchmarks.evidence.curves import Curve, Interval, mean_interval, ratio_interval, steps_ratio

REFERENCE = "uniform"
BY_SAMPLES = {"excess": "sliced"}  # what samples are judged by where an exact loss decides


@dataclass(frozen=True)
class Result:
    """The result of one cell.

    Attributes:
        task, target, method, name, group: of the cell.
        document: everything that was written.
    """

    task: str
    target: str
    method: str
    name: str
    group: str
    document: dict[str, Any]

    @classmethod
    def of(cls, document: dict[str, Any]) -> Result:
        return cls(**document["cell"], document=document)

    @property
    def held_out(self) -> bool:
        return self.document["held_out"]

    @property
    def quality(self) -> str:
        """The measure that decides."""
        return self.document["quality"]

    @property
    def by_samples(self) -> str:
        """The measure that would decide if samples alone were looked at."""
        return BY_SAMPLES.get(self.quality, self.quality)

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        """Those with samples, in order."""
        return [point for point in self.document["checkpoints"] if "metrics" in point]

    def values(self, metric: str, step: int | None = None) -> list[float]:
        """A measure of each seed at a checkpoint, the last one by default; nan where a network's
        samples were not finite."""
        points = [p for p in self.checkpoints if step in (None, p["step"])]
        return [math.nan if v is None else v for v in points[-1]["metrics"][metric]]

    def curve(self, seed: int, metric: str | None = None) -> Curve:
        """(steps, value) of one seed."""
        name = metric or self.quality
        return [(p["step"], self.values(name, p["step"])[seed]) for p in self.checkpoints]

    @property
    def seeds(self) -> int:
        return len(self.values(self.quality))

    @property
    def steps(self) -> list[int]:
        return [point["step"] for point in self.checkpoints]

    @property
    def law_share(self) -> float:
        """Share of a step's time that drawing and observing took."""
        last = self.checkpoints[-1]
        return last["law_seconds"] / last["seconds"]

    def mean(self, metric: str, step: int | None = None) -> Interval:
        return mean_interval(self.values(metric, step))


class Results:
    """Results of many cells, looked up by task, target and method."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.all = sorted(results, key=lambda result: result.name)
        self._by_name = {result.name: result for result in self.all}

    @classmethod
    def of(cls, cells: Sequence[Cell], folder: Path) -> Results:
        """Those of the cells whose results are there."""
        files = (folder / cell.file() for cell in cells)
        texts = (file.read_text("utf-8") for file in files if file.is_file())
        return cls(Result.of(json.loads(text)) for text in texts)

    def find(self, task: str, target: str, method: str) -> Result | None:
        """The result under the usual settings, if there is one."""
        return self._by_name.get(f"{task}/{target}/{method}")

    def pairs(self) -> list[tuple[str, str]]:
        """Tasks and targets of which there is something."""
        return sorted({(result.task, result.target) for result in self.all})

    def of_pair(self, task: str, target: str) -> list[Result]:
        """All methods of a task and target, the reference first."""
        found = [r for r in self.all if (r.task, r.target) == (task, target)]
        return sorted(found, key=lambda r: (r.method != REFERENCE, r.name))


def step_ratios(reference: Result, method: Result, metric: str | None = None) -> list[float]:
    """Paired by seed, see :func:`curves.steps_ratio`; of the measure that decides by default."""
    shared = range(min(reference.seeds, method.seeds))
    return [steps_ratio(reference.curve(s, metric), method.curve(s, metric)) for s in shared]


def time_ratios(reference: Result, method: Result) -> list[float]:
    """The same in processor time: the law's own time counts, the network's does not differ, and is
    taken from the reference for both, as a busy machine would tell nothing else."""
    quicker = (1 - method.law_share) / (1 - reference.law_share)
    return [ratio * quicker for ratio in step_ratios(reference, method)]


def quality_ratios(
    reference: Result, method: Result, metric: str | None = None, step: int | None = None
) -> list[float]:
    """Value of the reference / value of the method for each seed at a checkpoint."""
    name = metric or reference.quality
    pairs = zip(reference.values(name, step), method.values(name, step), strict=False)
    return [a / b if b else math.nan for a, b in pairs]


def over_tasks(groups: Sequence[Sequence[float]]) -> Interval:
    """Geometric mean over tasks, and its interval."""
    return ratio_interval(groups)
