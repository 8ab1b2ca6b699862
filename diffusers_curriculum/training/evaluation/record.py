"""The file of all metrics of a run, one line per evaluated step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_curriculum.training.storage.files import write_atomically

logger = logging.getLogger(__name__)

FILE_NAME = "eval_metrics.jsonl"


def write_metrics(
    folder: Path, step: int, values: Mapping[str, float], facts: Mapping[str, Any]
) -> None:
    """Put the line of one step into eval_metrics.jsonl, in the place of an older one of this step.

    Args:
        values: metrics; one that is not finite becomes null.
        facts: what the numbers depend on, as plain JSON data.

    Raises:
        OSError: the file could not be written; an older one is intact.
    """
    metrics = {name: x if math.isfinite(x) else None for name, x in values.items()}
    lines = read_metrics(folder) | {step: {"step": step, **metrics, **facts}}
    text = "".join(json.dumps(lines[key]) + "\n" for key in sorted(lines))
    write_atomically(folder / FILE_NAME, text)


def read_metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of eval_metrics.jsonl by step; a line that is damaged is a warning."""
    path = folder / FILE_NAME
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            content = json.loads(line)
            found[int(content["step"])] = content
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("Dropping a damaged line of %s: %r", path, error)
    return found
