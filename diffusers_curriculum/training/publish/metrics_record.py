"""Metrics that take time, computed now and then: told to the trackers, and kept in a file."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from diffusers_curriculum.training.storage.files import write_atomically

logger = logging.getLogger(__name__)

VALIDATION_LOSS = "validation_loss.jsonl"  # the file of that kind


@dataclass(frozen=True)
class MetricsRecord:
    """Metrics of one kind, a line of JSON for each step.

    Attributes:
        path: of the file.
        prefix: of their names at the trackers.
    """

    accelerator: Any
    path: Path
    prefix: str

    def add(self, step: int, values: Mapping[str, float], facts: Mapping[str, Any]) -> None:
        """Tell what was found after ``step`` steps; ``facts`` are kept beside it.

        Raises:
            OSError: the file could not be written.
        """
        told = {f"{self.prefix}/{name}": value for name, value in values.items()}
        self.accelerator.log(told, step=step)
        if self.accelerator.is_main_process:
            shown = [f"{name} {value:.4g}" for name, value in values.items() if "/" not in name]
            logger.info("step %d: %s %s", step, self.prefix, ", ".join(shown))
            write_metrics(self.path, step, values, facts)

    def lacks(self, step: int) -> bool:
        """Whether there is no line of a step; all processes ask, as one alone may see the file."""
        lacking = [step not in read_metrics(self.path)]
        broadcast_object_list(lacking)
        return lacking[0]


def write_metrics(
    path: Path, step: int, values: Mapping[str, float], facts: Mapping[str, Any]
) -> None:
    """Put the line of one step into a file, in the place of an older one of this step; a metric
    that is not finite becomes null.

    Raises:
        OSError: the file could not be written; an older one is intact.
    """
    metrics = {name: x if math.isfinite(x) else None for name, x in values.items()}
    lines = read_metrics(path) | {step: {"step": step, **metrics, **facts}}
    write_atomically(path, "".join(json.dumps(lines[key]) + "\n" for key in sorted(lines)))


def read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a file by step, none where there is no file; a line that is damaged is a
    warning."""
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            content = json.loads(line)
            found[int(content["step"])] = content
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("Dropping a damaged line of %s: %r", path, error)
    return found
