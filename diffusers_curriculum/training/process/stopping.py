"""Stopping at the end of an optimizer step: on a signal, or before the time is up."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class Reason:
    """Why a run stops, and with which exit status."""

    name: str
    status: int


# A process tells the others an index into this; where they differ, the largest counts.
REASONS = (
    Reason("", 0),
    Reason("--max_hours", 0),
    Reason("SIGINT", 130),
    Reason("SIGUSR1", 143),
    Reason("SIGTERM", 143),
)
_TIME = 1
# By name, as not every system has all of them.
_SIGNALS = {
    getattr(signal, reason.name): index
    for index, reason in enumerate(REASONS)
    if hasattr(signal, reason.name or "none")
}


class Stopped(Exception):
    """A run stopped early, after saving, because it was told to; ``status`` is the exit status."""

    def __init__(self, reason: Reason, step: int) -> None:
        super().__init__(
            f"stopped by {reason.name} after step {step}, which is saved; go on with "
            "--resume_from_checkpoint latest"
        )
        self.status = reason.status


class StopRequest:
    """Listens to SIGTERM, SIGUSR1 and Ctrl-C, and watches the clock, while it is a context.

    A second Ctrl-C raises KeyboardInterrupt at once. The handlers of before come back at the end.

    Args:
        max_hours: stop and save before so many hours have passed since this object was made;
            None for no limit.
        clock: seconds, never going back.

    Attributes:
        save_seconds: how long a save takes: the latest one's time, or a first guess.
    """

    def __init__(
        self, max_hours: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._limit = math.inf if max_hours is None else clock() + 3600 * max_hours
        self._last, self._longest, self.save_seconds = clock(), 0.0, 0.0
        self._told, self._agreed, self._step = 0, 0, 0
        self._interrupted = False
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread set handlers: elsewhere (a notebook) the clock remains.
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        self._last = self._clock()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None: set by something other than Python, which cannot be set again from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def requested(self, step: int) -> bool:
        """Whether to save and stop now; call it once at the end of each optimizer step.

        All processes return alike after ``step`` finished steps. With several it costs one exchange
        of an integer between the hosts; devices are not waited for.
        """
        now = self._clock()
        # Whatever happens between two steps (a save, a validation) may happen again.
        self._longest, self._last = max(self._longest, now - self._last), now
        late = now + self._longest + self.save_seconds > self._limit
        self._agreed = self._agree(max(self._told, _TIME if late else 0))
        self._step = step
        return self._agreed > 0

    def stopped(self) -> Stopped:
        """The exception to raise after saving; its message says why and how to go on."""
        return Stopped(REASONS[self._agreed], self._step)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Times a save, for --max_hours to leave room for one."""
        start = self._clock()
        yield
        self.save_seconds = self._clock() - start

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            # not a logger: the signal may have come while one was writing
            with contextlib.suppress(OSError):
                os.write(2, b"\nSaving at the end of this step; Ctrl-C again stops at once.\n")
        self._told = max(self._told, _SIGNALS[number])

    def _agree(self, told: int) -> int:
        """The largest over all processes, through the hosts."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return told
        if self._group is None:
            plain, world = distributed.get_backend() == "gloo", distributed.group.WORLD
            self._group = world if plain else distributed.new_group(backend="gloo")
        flag = torch.tensor(told, dtype=torch.int32)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group)
        return int(flag)


def ignore_stop_signals(worker: int) -> None:
    """Leave stop signals to the training process; a ``worker_init_fn`` for loader processes.

    Schedulers and launchers signal whole process groups. A loader process that dies of it would
    end the step that is to be finished. It still ends with its parent, or when that terminates it.
    """
    for number in _SIGNALS.keys() - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM goes on ending the loader
        # Not ignored, as the parent waits for ever for a child that cannot be terminated.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    """End this process at the first SIGTERM that its parent sent; those of others are dropped."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
