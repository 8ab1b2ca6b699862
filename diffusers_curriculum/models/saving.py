"""Saved weights that others may read, as far as the umask lets them."""

from __future__ import annotations

import os
from pathlib import Path

_OWNER_ONLY = 0o600


def share_weights(folder: str | Path, pattern: str = "**/*.safetensors") -> None:
    """Give weights in a folder the permissions of any new file: newer versions of safetensors write
    under a temporary name, for which only the owner has any."""
    private = [file for file in Path(folder).glob(pattern) if _is_private(file)]
    if private:
        mode = _mode_of_new_files(Path(folder))
        for file in private:
            file.chmod(mode)


def _is_private(file: Path) -> bool:
    return not file.is_symlink() and file.stat().st_mode & 0o777 == _OWNER_ONLY


def _mode_of_new_files(folder: Path) -> int:
    """Asked of the system, as a program cannot read its umask without changing it."""
    probe = folder / f".tmp-mode-{os.getpid()}"
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
    finally:
        probe.unlink(missing_ok=True)
    return mode
