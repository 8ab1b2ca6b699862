"""Runs that are killed with SIGKILL at random moments and started again until they are done.

One process imports torch and the scripts, and every start of a run is a fork of it: a trial takes
about a second. The test's own process is never forked, so its state cannot leak into a trial.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from diffusers_curriculum.training.storage.manifest import verify_checkpoint
from tests.reliability import trial
from tests.scripts.small_runs import Bench, checkpoint_names, hashes

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0  # seconds in which any trial ends by itself
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit statuses after a save on a signal


@dataclass(frozen=True)
class Kill:
    """When a process gets a signal: while it does what follows an event.

    Attributes:
        after: kind of the event; see ``trial.Journal``. "save" kills inside a save.
        count: which event of this kind, counted from 1 at the start of the process.
        moment: share of the usual time to the next event that has passed.
        numbers: the signals, sent one right after the other.
    """

    after: str
    count: int
    moment: float
    numbers: tuple[signal.Signals, ...] = (signal.SIGKILL,)


@dataclass
class Start:
    """One start of a run: what its journal says, and how it ended."""

    events: list[dict[str, Any]]
    status: int | None

    @property
    def killed(self) -> bool:
        """Whether it ended by SIGKILL."""
        return self.status == -signal.SIGKILL

    @property
    def stopped(self) -> bool:
        """Whether it saved because of a signal, and ended."""
        return self.status in STOPPED

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The optimizer steps that it finished."""
        return self.all("step")

    @property
    def saved(self) -> list[int]:
        """The checkpoints that it finished."""
        return [event["step"] for event in self.all("saved")]

    @property
    def resumed_at(self) -> int | None:
        """The step that it went on from, 0 for a fresh start; None if killed before it looked."""
        return next((event["step"] for event in self.all("resume")), None)

    @property
    def killed_inside_a_save(self) -> bool:
        """Whether the last thing it did was to begin a save."""
        return self.killed and bool(self.events) and self.events[-1]["what"] == "save"

    def all(self, what: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        return [event for event in self.events if event["what"] == what]


@dataclass
class Life:
    """A run from its first start to its end."""

    folder: Path
    starts: list[Start] = field(default_factory=list)

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """What counts of each optimizer step: the last time that it was made."""
        return {step["step"]: step for start in self.starts for step in start.steps}

    @property
    def pace(self) -> dict[str, float]:
        """By kind of event, the median seconds from there to the next one in the first start."""
        times: dict[str, list[float]] = defaultdict(list)
        for event, following in pairwise(self.starts[0].events):
            times[event["what"]].append(following["at"] - event["at"])
        return {what: median(lengths) for what, lengths in times.items()}


# -- starting and killing --------------------------------------------------------------------------


def live(
    folder: Path,
    argv: Sequence[str],
    kills: Iterable[Kill] = (),
    pace: Mapping[str, float] | None = None,
    vitals: bool = False,
    script: str = Bench.script,
) -> Life:
    """Start a run, kill or stop it as often as ``kills`` says, and start it until it is done.

    Args:
        argv: command line without ``--output_dir`` and ``--resume_from_checkpoint``.
        pace: of an undisturbed run; needed for kills.
        vitals: note them after each step; see ``trial.vitals``.
        script: the training script's module.

    Raises:
        RuntimeError: a start ended with an error; the message has its last output.
        CheckpointError: what has the name of a checkpoint is not a whole one, after any start.
    """
    life, moments = Life(folder / "output"), iter(kills)
    folder.mkdir(parents=True, exist_ok=True)
    everything = (*argv, "--output_dir", str(life.folder), "--resume_from_checkpoint", "latest")
    while not life.starts or life.starts[-1].status:
        number = len(list(folder.glob("*.jsonl")))
        files = (folder / f"{number}.jsonl", folder / f"{number}.txt")
        job = trial.Job(script, everything, *files, vitals)
        life.starts.append(_start(job, next(moments, None), pace or {}))
        check_whole(life)
    return life


def _start(job: trial.Job, kill: Kill | None, pace: Mapping[str, float]) -> Start:
    listening, speaking = multiprocessing.Pipe(duplex=False)
    process = _context().Process(target=trial.run, args=(job, speaking))
    process.start()
    speaking.close()
    try:
        if _reached(process, listening, kill) and kill:
            time.sleep(kill.moment * pace[kill.after])
            with contextlib.suppress(ProcessLookupError):  # it was done before
                for number in kill.numbers:
                    os.kill(process.pid, number)
        process.join(DEADLINE)
    finally:
        listening.close()
        if process.is_alive():
            process.kill()
            process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its orphaned loader workers
    if process.exitcode not in (0, -signal.SIGKILL, *STOPPED):
        output = job.output.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{job.output} ended with {process.exitcode}:\n{output}")
    return Start(events(job.journal), process.exitcode)


def _context() -> Any:
    """The fork server, started on first use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", trial.__name__])
    # The server must find this package, and must not touch a GPU: forks could not use it.
    # Killed processes leave semaphores, which the resource tracker clears up: not worth telling.
    quiet = "ignore:resource_tracker:UserWarning"
    changes = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": quiet}
    with mock.patch.dict(os.environ, changes):
        forkserver.ensure_running()
    return context


def _reached(process: BaseProcess, listening: Connection, kill: Kill | None) -> bool:
    """Wait for the event of the kill; False if the process ended without it."""
    missing = kill.count if kill else 1
    while missing and listening in wait([listening, process.sentinel], timeout=DEADLINE):
        try:
            what = listening.recv_bytes().decode()
        except EOFError:
            break
        missing -= kill is not None and what == kill.after
    return not missing


def events(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a kill may have torn the last one."""
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return [json.loads(line) for line in lines]


# -- judging ---------------------------------------------------------------------------------------


def check_whole(life: Life) -> None:
    """Verify every folder that has the name of a checkpoint."""
    for name in checkpoint_names(life.folder):
        verify_checkpoint(life.folder / name)


def lost(life: Life) -> list[str]:
    """Starts that did not go on from the newest checkpoint whose save had ended, or later."""
    faults, newest, reached = [], 0, 0
    for number, start in enumerate(life.starts):
        found = start.resumed_at
        if found is not None and not newest <= found <= reached:
            faults.append(f"start {number} from {found}, saved {newest}, reached {reached}")
        if start.steps and start.steps[0]["step"] != found:
            faults.append(f"start {number} from {found} began with {start.steps[0]['step']}")
        newest = max([newest, *start.saved])
        reached = max([reached, *(step["step"] + 1 for step in start.steps)])
    return faults


def differing_loss_bits(life: Life, reference: Life) -> int:
    """Bits in which losses differ, over all starts, those of repeated steps included."""
    expected = {number: step["loss"] for number, step in reference.steps.items()}
    made = [step for start in life.starts for step in start.steps]
    return sum(_bits(*map(_float_bytes, (s["loss"], expected[s["step"]]))) for s in made)


def differing_file_bits(life: Life, reference: Life, name: str) -> int:
    """Bits in which the tensors and numbers below the folder ``name`` of two runs differ."""
    folders = [one.folder / name for one in (life, reference)]
    mine, other = (hashes(folder) for folder in folders)
    changed = {file for file in {*mine, *other} if mine.get(file) != other.get(file)}
    return sum(_bits(*(_content(folder / file) for folder in folders)) for file in changed)


def _float_bytes(text: str) -> bytes:
    return struct.pack("<d", float.fromhex(text))


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _bits(one: bytes, other: bytes) -> int:
    """Number of bits that differ; all of what only one of them has."""
    common = min(len(one), len(other))
    a, b = (int.from_bytes(content[:common]) for content in (one, other))
    return (a ^ b).bit_count() + 8 * (max(len(one), len(other)) - common)
