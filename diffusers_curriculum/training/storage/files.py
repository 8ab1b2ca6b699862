"""Files that are whole or not there, whatever ends the program that writes them."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers_curriculum.training.errors import DiskFullError

logger = logging.getLogger(__name__)

_HALF_WRITTEN = re.compile(r"\.tmp-.+\.jsonl?-[0-9]+")
# EFBIG: the process's file size limit; EDQUOT: the user's quota.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under another name, sync it to disk, and only then give it its own.

    Raises:
        OSError: the file could not be written; an older one of this name is intact.
    """
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def disk_full_explained(path: Path, needed: int) -> Iterator[None]:
    """Make a DiskFullError of the system's word that there is no space or quota for ``needed``
    bytes, or a limit on the size of files."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskFullError(path, needed, free, error) from error


def remove_half_written(folder: Path) -> None:
    """Remove the JSON files in ``folder`` that a killed program was writing."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _HALF_WRITTEN.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            logger.info("Removing %s, left by an earlier run.", path)
            path.unlink()
