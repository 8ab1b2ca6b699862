"""How a training script ends: the error for wrong input, and the exit statuses."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit statuses of the training scripts."""

    DONE = 0
    USAGE = 2  # bad arguments, data or checkpoint
    NONFINITE = 3  # a loss or gradient was not finite; nothing was saved after it
    DISK = 4  # no space to write
    INTERRUPTED = 130  # Ctrl-C, after saving
    SIGNAL = 143  # stopped by a signal, after saving


class UsageError(ValueError):
    """Bad arguments, data or checkpoint; a script prints the message and exits with status 2."""


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; a script stops with status 3 and saves nothing."""
