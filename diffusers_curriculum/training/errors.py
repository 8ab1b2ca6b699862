"""How a training script ends: its errors, and the exit status of each."""

from __future__ import annotations

import errno
import json
import os
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
    """Give torch's launcher the message that ends this process, for the end of its own report; see
    ``torch.distributed.elastic.multiprocessing.errors``. Nothing is done without one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": _now()}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}), "utf-8")


def _now() -> str:
    return str(int(time.time()))


@contextmanager
def usage_errors(flag: str) -> Iterator[None]:
    """Turn the library's ValueError into a UsageError that names the flag."""
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{flag}: {error}") from error
