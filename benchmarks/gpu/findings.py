"""What one part finds, kept on disk while it goes on, so that an overrun loses nothing."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import LEFT_OUT

PASSED, FAILED, TIMEOUT = "passed", "failed", "timeout"
NOT_INSTALLED, NOT_APPLICABLE = "not installed", "not applicable"
OUT_OF_MEMORY = "out of memory"
BAD = (FAILED, TIMEOUT)


Measure = Callable[[], dict[str, Any]]


class CheckError(RuntimeError):
    """A check found something else than it must."""


class Unavailable(RuntimeError):
    """A check cannot be made here; its message is the status, NOT_INSTALLED or NOT_APPLICABLE."""


def check(holds: bool, message: str) -> None:
    """Raise CheckError with ``message`` unless ``holds``."""
    if not holds:
        raise CheckError(message)


class Findings:
    """Rows by name; each is a dict with a ``status`` and whatever was measured.

    Args:
        path: JSON file that is written anew after every row.
        until: time.time() at which all must be done.
    """

    def __init__(self, path: Path | None = None, until: float = math.inf) -> None:
        self.path, self.until = path, until
        self.rows: dict[str, dict[str, Any]] = {}

    def attempt_all(self, measures: Mapping[str, Measure]) -> None:
        """Run measurements while one as long as the longest so far would end in time; the others
        are told as left out, also where something ends this process."""
        for name in measures:
            self.rows[name] = {"status": LEFT_OUT, "error": "no time was left for this row"}
        self.save()
        longest = 0.0
        for name, measure in measures.items():
            if time.time() + longest > self.until:
                break
            self.attempt(name, measure)
            longest = max(longest, self.rows[name]["seconds"])

    def attempt(self, name: str, measure: Measure) -> bool:
        """Run one measurement and keep what it returns, or why it failed; the next one goes on."""
        start = time.perf_counter()
        try:
            row: dict[str, Any] = {"status": PASSED, **measure()}
        except Unavailable as reason:
            row = {"status": str(reason)}
        except torch.OutOfMemoryError as error:
            row = {"status": OUT_OF_MEMORY, "error": str(error)[:300]}
        # Whatever goes wrong in one row belongs in the report, and must not end the others.
        except Exception as error:
            row = {"status": FAILED, **described(error)}
        row["seconds"] = round(time.perf_counter() - start, 2)
        self.rows[name] = row
        self.save()
        return row["status"] == PASSED

    @property
    def status(self) -> str:
        """FAILED if any row is, else PASSED, else what all rows are."""
        found = [row["status"] for row in self.rows.values()]
        if any(status in BAD for status in found):
            return FAILED
        return PASSED if PASSED in found or not found else found[0]

    def save(self) -> None:
        """Write the rows to ``path``, whole or not at all."""
        if self.path is not None:
            write_json(self.path, self.rows)


def described(error: BaseException) -> dict[str, str]:
    """The message of an error and the end of its stack."""
    stack = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error}"[:2000], "stack": stack[-4000:]}


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON, whole or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
