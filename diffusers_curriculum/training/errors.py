"""How a training script ends: its errors, and the exit status of each."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Exit statuses of the training scripts."""

    DONE = 0
    USAGE = 2  # bad arguments, data or checkpoint
    NONFINITE = 3  # a loss or gradient was not finite; nothing was saved after it
    DISK = 4  # no space to write
    INTERRUPTED = 130  # Ctrl-C, after saving
    SIGNAL = 143  # stopped by a signal, after saving


class UsageError(ValueError):
    """Bad arguments, data, models or checkpoint; a script prints the message, which has the value
    and the remedy, and exits with status 2. Whatever reads one of these may raise it."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, or does not fit the run."""


class HubError(UsageError):
    """A name, licence, token or folder that the Hub could not take."""


class OutOfMemoryError(UsageError):
    """The arguments need more memory than there is."""


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; a script stops with status 3 and saves nothing."""


class DiskFullError(OSError):
    """There is no room for a checkpoint; a script stops with status 4.

    Attributes:
        needed: bytes that the checkpoint takes, as far as known.
        free: bytes that were free.
    """

    def __init__(self, path: Path, needed: int, free: int, cause: object) -> None:
        super().__init__(
            f"No space for {path}: it needs about {needed:,} bytes, {free:,} are free ({cause}). "
            "Older checkpoints are intact. Free some space or raise the quota or file size limit, "
            "keep fewer with --checkpoints_total_limit, or choose another --output_dir; then "
            "resume from latest."
        )
        self.errno, self.needed, self.free = errno.ENOSPC, needed, free


def tell_launcher(message: str) -> None:
    """Let the message that ends this process be the last of its launcher's, too.

    torch's launcher is given it for the end of its own report; see
    ``torch.distributed.elastic.multiprocessing.errors``. `accelerate launch` of one process ends
    with a traceback of its own: the message is written once more after that. Nothing is done
    without a launcher, or under one that is told to be quiet.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    with suppress(OSError):
        if path:
            told = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": _now()}}
            Path(path).write_text(json.dumps({"message": told}), "utf-8")
        elif _tells_a_traceback(launcher := os.getppid()):
            _repeat_after(launcher, message)


# A launcher's program or module, as the first words of its command line have it
_ACCELERATE = re.compile(r"(^|[/\\])accelerate([-./\\](launch|exe|commands[./\\]\w+))*(\.py)?$")
_QUIET = {"-q", "--quiet"}
_REPEAT = """
import sys, time, psutil
message, end = sys.stdin.buffer.read(), time.monotonic() + 30
try:
    launcher = psutil.Process(int(sys.argv[1]))
    while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            break
        time.sleep(0.01)
except psutil.Error:
    pass
sys.stderr.buffer.write(message)
"""


def _tells_a_traceback(process: int) -> bool:
    """Whether a process is an `accelerate launch` that shows a traceback if its script fails."""
    import psutil  # accelerate's; here, as only a run that fails asks for it

    try:
        words = psutil.Process(process).cmdline()
    except psutil.Error:
        return False
    plain = [words[0], *(word for word in words[1:] if not word.startswith("-"))] if words else []
    return any(map(_ACCELERATE.search, plain[:2])) and not _QUIET & {*words}


def _repeat_after(process: int, message: str) -> None:
    """Leave a process behind that writes ``message`` to stderr as soon as another has ended, and
    that holds nothing but stderr until then."""
    os.fstat(2)  # OSError where stderr is closed
    messenger = subprocess.Popen(
        [sys.executable, "-c", _REPEAT, str(process)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
        errors="backslashreplace",
    )
    if messenger.stdin is not None:
        with messenger.stdin as pipe:
            pipe.write(f"{message}\n")


def _now() -> str:
    return str(int(time.time()))


# What comes of a value that cannot be, and what libraries stumble over that build from a config
OF_VALUES = (TypeError, ValueError, OverflowError)
OF_CONFIGS = (*OF_VALUES, ArithmeticError, LookupError, NameError, NotImplementedError)


@contextmanager
def usage_errors(flag: str, kinds: tuple[type[Exception], ...] = OF_VALUES) -> Iterator[None]:
    """Turn the library's ValueError, or some ``kinds`` of error, into a UsageError that names the
    flag."""
    try:
        yield
    except UsageError:
        raise
    except OF_VALUES as error:
        raise UsageError(f"{flag}: {error}") from error
    except kinds as error:
        told = f"{type(error).__name__}: {error}"
        raise UsageError(f"{flag}: its config cannot be built ({told}): correct it.") from error
