"""One run of a training script in a process of its own, which writes a journal of what it does.

A fork server imports this module, and with it torch and the scripts, once for all trials.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

# What a run imports late, so that each trial need not: tensorboard, and scipy.io for a scheduler.
import scipy.io  # noqa: F401
import torch
import torch.utils.tensorboard

from diffusers_curriculum.training.loop import job as jobs
from diffusers_curriculum.training.loop import saving
from diffusers_curriculum.training.loop.monitor import LevelMonitor
from diffusers_curriculum.training.process import runtime
from tests.scripts.small_runs import Bench, loss_of, reset_accelerate, stage_of

importlib.import_module(Bench.script)  # any other script is imported where it is run


@dataclass(frozen=True)
class Job:
    """What a trial runs.

    Attributes:
        script: module with a ``main(argv)``.
        journal: a line of JSON for everything that happens; what is in it survives a SIGKILL.
        output: standard output and standard error.
        vitals: note memory, descriptors and CPU time after each step.
    """

    script: str
    argv: tuple[str, ...]
    journal: Path
    output: Path
    vitals: bool = False


class Journal:
    """Appends whole lines with one system call each: nothing stays in a buffer of the process.

    The kinds of events are "start" of the process, "resume" once it is known from where, "step"
    and "saved" when these are done, "save" when it begins, "finish" after the last step, "exit".
    """

    def __init__(self, path: Path, announcements: Connection) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.announcements = announcements

    def note(self, what: str, **values: Any) -> None:
        """Add an event, and announce its kind."""
        line = json.dumps({"what": what, "at": time.monotonic(), **values})
        os.write(self.file, line.encode() + b"\n")
        self.announcements.send_bytes(what.encode())


def run(job: Job, announcements: Connection) -> None:
    """Run the job to its end and exit with its status."""
    os.setsid()  # so that loader workers which a kill orphans can be told from others
    multiprocessing.set_start_method(None, force=True)  # that of a process started normally
    output = os.open(job.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    reset_accelerate()
    script, journal = importlib.import_module(job.script), Journal(job.journal, announcements)
    journal.note("start")
    with journalled(script, journal, vitals if job.vitals else dict):
        status = runtime.exit_status(lambda: script.main(job.argv))
    journal.note("exit", status=status)
    sys.exit(status)


@contextmanager
def journalled(
    script: ModuleType, journal: Journal, measure: Callable[[], dict[str, float]]
) -> Iterator[None]:
    """Note what a script does, and change nothing but the two pictures at the end: left out."""
    consumed: list[int] = []
    wrapped = {
        "find_checkpoint": _finding(jobs.find_checkpoint, journal),
        "make_update": _stepping(jobs.make_update, journal, consumed, measure),
    }
    step = _consuming(script.training_step, consumed)

    def finish(monitor: LevelMonitor, folder: str) -> None:
        journal.note("finish")

    with (
        mock.patch.object(script, "training_step", step),
        mock.patch.multiple(jobs, **wrapped),
        mock.patch.object(saving, "save_checkpoint", _saving(saving.save_checkpoint, journal)),
        mock.patch.object(LevelMonitor, "finish", finish),
    ):
        yield


def _finding(find: Callable[..., Path | None], journal: Journal) -> Callable[..., Path | None]:
    def find_checkpoint(*args: Any, **kwargs: Any) -> Path | None:
        found = find(*args, **kwargs)
        journal.note("resume", step=int(found.name.split("-")[1]) if found else 0)
        return found

    return find_checkpoint


def _saving(save: Callable[..., Any], journal: Journal) -> Callable[..., Any]:
    def save_checkpoint(output_dir: Any, step: int, *args: Any, **kwargs: Any) -> Any:
        journal.note("save", step=step)
        saved = save(output_dir, step, *args, **kwargs)
        journal.note("saved", step=step)
        return saved

    return save_checkpoint


def _consuming(make: Callable[..., Any], consumed: list[int]) -> Callable[..., Any]:
    def training_step(run: Any, step: int, slots: Any, batch: dict[str, torch.Tensor]) -> Any:
        consumed.extend(sample_number(image) for image in batch["pixel_values"])
        return make(run, step, slots, batch)

    return training_step


def _stepping(
    make: Callable[..., Any],
    journal: Journal,
    consumed: list[int],
    measure: Callable[[], dict[str, float]],
) -> Callable[..., Any]:
    def make_update(run: Any, step: int, *args: Any) -> Any:
        consumed.clear()
        stage = stage_of(run.sampler, step)
        result = make(run, step, *args)
        journal.note(
            "step",
            step=step,
            loss=loss_of(result[0]).hex(),
            stage=stage,
            consumed=list(consumed),
            **measure(),
        )
        return result

    return make_update


# -- what a sample and a process look like ---------------------------------------------------------

SHADE = 5  # sample i is an even grey of brightness 5 i, which no crop, flip or resize changes


def sample_number(image: torch.Tensor) -> int:
    """Which sample an image of pixels in [-1, 1] is; of a set of one-coloured images."""
    return round((float(image.mean()) + 1) / 2 * 255 / SHADE)


def vitals() -> dict[str, float]:
    """Resident bytes, open file descriptors and CPU seconds of this process; Linux only.

    "yard" is the time that a fixed piece of work takes at this moment, as other programs on the
    machine make the same work cost up to a third more CPU time; "cpu" is taken before it.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = time.process_time()
    yardstick()
    return {
        "cpu": before,
        "yard": time.process_time() - before,
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
    }


@torch.no_grad()
def yardstick() -> None:
    """About three milliseconds of what a step consists of: small operations, called from Python,
    on more memory than a cache of a core holds."""
    for image, kernel in _YARD:
        torch.nn.functional.silu(torch.nn.functional.conv2d(image, kernel, padding=1))


_YARD = [(torch.zeros(2, 8, 32, 32), torch.ones(8, 8, 3, 3)) for _ in range(50)]
