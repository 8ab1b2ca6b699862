"""run.json: what was run, with what, and when; readable without this package. Beside it run.yaml,
the flags of the newest session as a file for --config.

run.json tells and decides nothing: what a resumed run is compared with stands in the checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffusers_curriculum.training.checkpoint.same_run import Difference
from diffusers_curriculum.training.storage.files import write_atomically
from diffusers_curriculum.training.storage.manifest import versions

logger = logging.getLogger(__name__)

FILE = "run.json"
FLAGS_FILE = "run.yaml"
FORMAT = 1


class RunRecord:
    """The record of one run, with one session for each start of the program.

    A session holds when it started and ended (UTC), how, its steps, the arguments without secrets
    (the allow-list that trackers get), what is in effect of what a launcher may set besides them,
    versions, and the changes that were allowed. A session that was killed keeps the outcome
    "running" and no end. A record that cannot be written is told in the log: it must not end a run
    whose checkpoints are safe.

    Args:
        facts: what the manifests of this session's checkpoints hold.
        resumed_from: the checkpoint, None for a new run; ``changed``: differences to it.
        enabled: whether this process writes; the main one does.
        in_effect: device, precision, accumulation, ... as ``process.launcher`` reads them back.
        flags: the text of run.yaml; none of it, no file.
    """

    def __init__(
        self,
        output_dir: str | Path,
        arguments: Mapping[str, Any],
        facts: Mapping[str, Any],
        first_step: int = 0,
        resumed_from: str | Path | None = None,
        changed: Collection[Difference] = (),
        enabled: bool = True,
        in_effect: Mapping[str, Any] | None = None,
        flags: str = "",
    ) -> None:
        self.path, self._enabled = Path(output_dir, FILE), enabled
        self._facts, self._flags = dict(facts), flags
        self._earlier: list[dict[str, Any]] = []
        self._session: dict[str, Any] = {
            "started": _now(),
            "ended": None,
            "outcome": "running",
            "first_step": first_step,
            "last_step": None,
            "resumed_from": None if resumed_from is None else str(resumed_from),
            "changed": [str(difference) for difference in changed],
            "world_size": facts.get("world_size"),
            "arguments": dict(arguments),
            "in_effect": dict(in_effect or {}),
            "versions": {"python": platform.python_version(), **versions()},
        }

    def start(self) -> None:
        """Write the session down as running, before the first step."""
        if self._enabled:
            self._earlier = _earlier_sessions(self.path)
            self._write()
            if self._flags:
                self._write_text(self.path.with_name(FLAGS_FILE), self._flags)

    def finish(self, last_step: int, outcome: str = "done") -> None:
        """Write how the session ended after ``last_step`` steps: "done", or why it stopped."""
        self._session |= {"ended": _now(), "outcome": outcome, "last_step": last_step}
        if self._enabled:
            self._write()

    def _write(self) -> None:
        sessions = [*self._earlier, self._session]
        document = {"format": FORMAT, "facts": self._facts, "sessions": sessions}
        self._write_text(self.path, json.dumps(document, indent=2) + "\n")

    @staticmethod
    def _write_text(path: Path, text: str) -> None:
        try:
            write_atomically(path, text)
        except OSError as error:
            logger.warning("%s was not written (%s); training goes on.", path, error)


def recorded_facts(output_dir: str | Path) -> dict[str, Any]:
    """The facts in the run.json of a folder; none where there is no such file that can be read."""
    try:
        facts = json.loads(Path(output_dir, FILE).read_text("utf-8"))["facts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _earlier_sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions recorded so far; a record that cannot be read is moved aside, not lost."""
    try:
        sessions = json.loads(path.read_text("utf-8"))["sessions"]
        if isinstance(sessions, list):
            return sessions
        reason = "it holds no list of sessions"
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    kept = path.with_name(f"{path.name}.unreadable")
    logger.warning("%s cannot be read (%s): kept as %s.", path, reason, kept.name)
    try:
        os.replace(path, kept)
    except OSError as error:
        logger.warning("%s could not be moved aside (%s).", path, error)
    return []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
