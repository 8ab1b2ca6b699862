"""A tiny pipeline and its images, runs of the official script on them, and how they ended."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from datasets import config

from benchmarks.official_faults import trial
from benchmarks.official_faults.faults import Fault
from tests.scripts.small_runs import Bench, make_bench

DEADLINE = 120.0  # seconds in which any run ends by itself
STUBS = Path(__file__).parents[2] / "tests" / "drop_in" / "stubs"
ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|error)\b.*", re.MULTILINE)
UNREAD = "Could not load random states"
# The official script saves after this step, in the middle of its first epoch of 9 steps.
SAVED, STEPS = 4, 10


@dataclass(frozen=True)
class Outcome:
    """How one process ended.

    Attributes:
        status: exit status; negative for the signal that ended it, None if it hung.
        events: what ``trial.Journal`` noted.
    """

    status: int | None
    output: str
    events: list[dict[str, Any]]
    folder: Path

    def all(self, what: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        return [event for event in self.events if event["what"] == what]

    @property
    def losses(self) -> dict[int, str]:
        """Logged loss by step, every bit of it."""
        return {event["step"]: event["value"] for event in self.all("loss")}

    @property
    def seconds(self) -> float:
        """Seconds from the end of the imports to the end of the process."""
        return self.all("end")[0]["at"]

    @property
    def error(self) -> str:
        """The last line that tells of an error, without folders; empty if none does."""
        lines = ERROR.findall(self.output)
        return shortened(lines[-1]) if lines else ""

    @property
    def end(self) -> str:
        """Exit status, and the error if there is one."""
        return f"exit {self.status}" + (f", {self.error!r}" if self.status and self.error else "")

    @property
    def warnings(self) -> list[str]:
        """Warnings of the log, and the one remark on a checkpoint that is below a warning."""
        found = re.findall(r" - (WARNING|ERROR) - \S+ - (.*)|(\w+Warning: .*)", self.output)
        unread = [f"INFO: {UNREAD!r}"] if UNREAD in self.output else []
        return unread + [": ".join(part for part in parts if part) for parts in found]

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoint folders that are there now."""
        return sorted(path.name for path in self.folder.glob("checkpoint*"))


def shortened(text: str, length: int = 110) -> str:
    """A line without absolute folders and not too long."""
    text = re.sub(r"(?:/[^/\s'\":,]+)+/(?=[^/\s'\":,]+)", "", text)
    return text if len(text) <= length else text[: length - 3] + "..."


def said(lines: list[str]) -> str:
    """Some lines of a log in words."""
    return "only " + ", ".join(sorted(set(map(shortened, lines)))) if lines else "not a word"


def hide_the_stand_in() -> None:
    """Let libraries look for torchvision before a stand-in can be found in its place."""
    known = config.TORCHVISION_AVAILABLE, transformers.utils.is_torchvision_available()
    if not all(known):
        sys.path.insert(0, str(STUBS))


class Workplace:
    """Where the runs are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.script = root / "train_text_to_image.py"
        self.bench: Bench = make_bench(root / "bench")
        self.runs = 0
        self.shared: dict[str, Outcome] = {}  # runs that several rows are made from

    def folder(self, template: Path | None = None) -> Path:
        """A new output folder, a copy of ``template`` if one is given."""
        self.runs += 1
        folder = self.root / f"run-{self.runs}" / "out"
        folder.parent.mkdir()
        if template is not None:
            shutil.copytree(template, folder)
        return folder

    def run(
        self,
        *flags: object,
        faults: Sequence[Fault] = (),
        folder: Path | None = None,
        batch: int = 2,
    ) -> Outcome:
        """One process to its end."""
        (outcome,) = self._runs(flags, faults, folder or self.folder(), batch, 1)
        return outcome

    def run_two(self, *flags: object, folder: Path | None = None, batch: int = 2) -> list[Outcome]:
        """Two processes, connected through gloo, to their end."""
        return self._runs(flags, (), folder or self.folder(), batch, 2)

    @cached_property
    def whole(self) -> Outcome:
        """A run of ``STEPS`` steps that nothing happens to, with two checkpoints."""
        return self.run("--max_train_steps", STEPS, "--checkpointing_steps", SAVED)

    def saved(self) -> Path:
        """A new copy of the output folder of ``whole`` with its first checkpoint only."""
        folder = self.folder()
        name = f"checkpoint-{SAVED}"
        shutil.copytree(self.whole.folder / name, folder / name)
        return folder

    def resume(self, folder: Path, *flags: object, faults: Sequence[Fault] = ()) -> Outcome:
        """Go on from ``checkpoint-4`` for one step, or as the flags say."""
        name = ("--resume_from_checkpoint", f"checkpoint-{SAVED}")
        return self.run(*name, "--max_train_steps", SAVED + 1, *flags, folder=folder, faults=faults)

    def run_other(self, script: Path, folder: Path, *argv: str) -> Outcome:
        """Another script than the official one, in a working folder."""
        number = len(list(folder.glob("*.jsonl")))
        files = (folder / f"{number}.jsonl", folder / f"{number}.txt")
        return _ended(*_started(trial.Job(script, argv, *files)), folder)

    def _runs(
        self, flags: Sequence[object], faults: Sequence[Fault], folder: Path, batch: int, count: int
    ) -> list[Outcome]:
        jobs = self._jobs(flags, faults, folder, batch, count)
        return [_ended(job, process, folder) for job, process in [_started(job) for job in jobs]]

    def _jobs(
        self, flags: Sequence[object], faults: Sequence[Fault], folder: Path, batch: int, count: int
    ) -> list[trial.Job]:
        argv = self.bench.argv(folder, *flags, batch=batch)
        number = len(list(folder.parent.glob("*.jsonl")))
        port = _free_port()
        jobs = []
        for rank in range(count):
            name = f"{number}-{rank}"
            files = (folder.parent / f"{name}.jsonl", folder.parent / f"{name}.txt")
            ranks = _ranks(rank, count, port) if count > 1 else {}
            jobs.append(trial.Job(self.script, argv, *files, faults, ranks))
        return jobs


def _started(job: trial.Job) -> tuple[trial.Job, Any]:
    process = multiprocessing.get_context("fork").Process(target=trial.run, args=(job,))
    process.start()
    return job, process


def _ended(job: trial.Job, process: Any, folder: Path) -> Outcome:
    process.join(DEADLINE)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    lines = job.journal.read_text().split("\n")[:-1] if job.journal.exists() else []
    output = job.output.read_text("utf-8", "replace") if job.output.exists() else ""
    return Outcome(status, output, [json.loads(line) for line in lines], folder)


def _ranks(rank: int, count: int, port: int) -> dict[str, str]:
    number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in (number | place).items()}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
