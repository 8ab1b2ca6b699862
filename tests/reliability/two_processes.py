"""Runs of a training script in one or two gloo processes on the loopback device, which may be
killed, and what each rank saw at each step.

Every rank is a fork of the harness's server, so that a trial costs no imports. Nobody ends the
ranks that a killed one leaves behind: a launcher would, but they must notice by themselves.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from diffusers_curriculum import Objective
from diffusers_curriculum.training.loop import job as jobs
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.storage.manifest import verify_checkpoint
from diffusers_curriculum.training.tasks.flow import FlowRun
from diffusers_curriculum.training.tasks.image_tokens import ImageTokenRun
from tests.reliability import harness
from tests.reliability.harness import Start, events
from tests.reliability.trial import Journal, journalled
from tests.scripts.small_runs import Bench, checkpoint_names, reset_accelerate
from tests.scripts.witness import Testimony, witnessed

DEADLINE = 60.0  # seconds in which a job must end once one of its ranks is gone


@dataclass(frozen=True)
class Kill:
    """When a rank gets a signal.

    Attributes:
        rank: which one.
        after: once that rank has finished so many steps or, where ``save``, once the main process
            has begun so many saves.
        delay: seconds to wait then.
        save: what ``after`` counts.
        number: the signal.
    """

    rank: int
    after: int
    delay: float
    save: bool = False
    number: signal.Signals = signal.SIGKILL


@dataclass(frozen=True)
class Fault:
    """What is not finite, on one rank in one step.

    Attributes:
        gradients: NaN gradients, which every rank meets once they are averaged; otherwise only
            this rank's losses are infinite, which no other rank can know.
    """

    rank: int
    step: int
    gradients: bool = True


class Nobody:
    """Listens to no announcement: who watches several ranks reads their journals."""

    def send_bytes(self, what: bytes) -> None:
        """Forget it."""


@dataclass
class Outcome:
    """How a job ended.

    Attributes:
        ranks: the journal and the exit status of each.
        seconds: from the kill, or from the start where there was none, to the end of all ranks.
        in_save: whether the main process was inside a save when the kill came.
    """

    ranks: list[Start]
    seconds: float
    in_save: bool = False
    outputs: list[Path] = field(default_factory=list)

    @property
    def statuses(self) -> list[int | None]:
        """Exit status of each rank; minus the signal's number where one ended it."""
        return [rank.status for rank in self.ranks]

    def saw(self, rank: int) -> dict[int, dict[str, Any]]:
        """step -> what this rank saw, computed and held after it."""
        told = [event for event in self.ranks[rank].all("saw") if event.pop("at", True)]
        return {event["step"]: event for event in told}

    def together(self) -> dict[int, dict[str, Any]]:
        """step -> slot of the global batch -> what its sample was and drew, of all ranks."""
        merged: dict[int, dict[str, Any]] = {}
        for rank in range(len(self.ranks)):
            for step, event in self.saw(rank).items():
                merged.setdefault(step, {}).update(event["slots"])
        return merged

    def said(self) -> str:
        """The end of what the ranks wrote, for the message of a failed test."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.outputs)


# -- starting, killing, waiting --------------------------------------------------------------------


def launch(
    folder: Path,
    argv: Sequence[str],
    processes: int = 2,
    kill: Kill | None = None,
    fault: Fault | None = None,
    script: str = Bench.script,
    variables: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a script in several processes, and wait for the end of all.

    Args:
        folder: journals and outputs of the ranks go here; made if missing.
        script: the training script's module.
        variables: of the environment of every rank, besides those of a launcher.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.rank0.jsonl")))
    journals = [folder / f"{number}.rank{rank}.jsonl" for rank in range(processes)]
    outputs = [path.with_suffix(".txt") for path in journals]
    port, ranks = _free_port(), []
    for rank, (journal, output) in enumerate(zip(journals, outputs, strict=True)):
        environment = _environment(rank, processes, port) | dict(variables or {})
        own = fault if fault and fault.rank == rank else None
        ranks.append(_fork(script, tuple(argv), environment, journal, output, own))
    begun, in_save = time.monotonic(), False
    try:
        if kill and _moment_has_come(kill, ranks[kill.rank], journals):
            in_save = _saving(journals[0])
            os.kill(ranks[kill.rank].pid, kill.number)
            begun = time.monotonic()
        _wait_for_all(ranks, DEADLINE if kill else harness.DEADLINE)
        seconds = time.monotonic() - begun
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    ended = zip(journals, ranks, strict=True)
    starts = [Start(events(path), rank.exitcode) for path, rank in ended]
    return Outcome(starts, seconds, in_save, outputs)


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun sets, and nothing where a single process is started without it."""
    alone = {"ACCELERATE_USE_CPU": "true"}
    if processes == 1:
        return alone
    return alone | {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fork(*job: Any) -> BaseProcess:
    process = harness._context().Process(target=run_rank, args=job)
    process.start()
    return process


def _moment_has_come(kill: Kill, victim: BaseProcess, journals: Sequence[Path]) -> bool:
    """Wait for the moment of the kill; False if the rank to be killed has ended before."""
    what, journal = ("save", journals[0]) if kill.save else ("step", journals[kill.rank])
    while len(Start(events(journal), None).all(what)) < kill.after:
        if victim.exitcode is not None:
            return False
        time.sleep(0.002)
    time.sleep(kill.delay)
    return victim.exitcode is None


def _saving(journal: Path) -> bool:
    """Whether the last save that the journal tells of has not ended."""
    saves = [event for event in events(journal) if event["what"] in ("save", "saved")]
    return bool(saves) and saves[-1]["what"] == "save"


def _wait_for_all(ranks: Sequence[BaseProcess], seconds: float) -> None:
    """Wait until all have ended or the time is over."""
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(end - time.monotonic(), 0))


def check_whole(output: Path) -> list[str]:
    """The checkpoints in an output folder; raises CheckpointError if one of them is not whole."""
    names = sorted(checkpoint_names(output), key=lambda name: int(name.split("-")[1]))
    for name in names:
        verify_checkpoint(output / name)
    return names


# -- inside a rank ---------------------------------------------------------------------------------


def run_rank(
    name: str,
    argv: tuple[str, ...],
    variables: dict[str, str],
    journal: Path,
    output: Path,
    fault: Fault | None,
) -> None:
    """Run a script as one rank, and exit with its status.

    Args:
        name: of the script's module.
        fault: what is not finite on this rank, if anything.
    """
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    reset_accelerate()
    listener: Any = Nobody()
    script, notes = importlib.import_module(name), Journal(journal, listener)
    with (
        witnessed(script=script) as told,
        spoiling(script, fault),
        journalled(script, notes, dict),
        telling(notes, told),
    ):
        status = runtime.exit_status(lambda: script.main(argv))
    notes.note("exit", status=status)
    sys.exit(status)


@contextmanager
def spoiling(module: ModuleType, fault: Fault | None) -> Iterator[None]:
    """Make what the fault says happen."""
    make: Callable[..., Any] = module.training_step

    def training_step(run: Any, step: int, *args: Any) -> Any:
        if fault is None or step != fault.step:
            return make(run, step, *args)
        own: Any = [kind for kind in (FlowRun, ImageTokenRun) if isinstance(run, kind)]
        kind = own[0] if own else Objective
        compute, gradients = kind.loss, fault.gradients

        def spoilt(*own: Any) -> Any:
            if gradients:
                return tuple(value * torch.nan for value in compute(*own))
            return tuple(value + torch.inf for value in compute(*own))  # the gradients stay

        with mock.patch.object(kind, "loss", spoilt):
            return make(run, step, *args)

    with mock.patch.object(module, "training_step", training_step):
        yield


@contextmanager
def telling(journal: Journal, told: Testimony) -> Iterator[None]:
    """Note after each step what the witness saw in it: what is in the journal survives a kill."""
    make: Callable[..., Any] = jobs.make_update
    heard = 0

    def make_update(run: Any, step: int, *args: Any) -> Any:
        nonlocal heard
        result = make(run, step, *args)
        journal.note(
            "saw",
            step=step,
            slots={str(slot): dict(what) for slot, what in sorted(told.seen[step].items())},
            loss=told.losses[-1].hex(),
            lr=told.lrs[-1].hex(),
            stage=told.stages[-1],
            state=told.states[-1],
            noise=told.noise[heard:],
        )
        heard = len(told.noise)
        return result

    with mock.patch.object(jobs, "make_update", make_update):
        yield
