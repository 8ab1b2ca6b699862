"""Text files that are whole or not there, whatever ends the program that writes them."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

logger = logging.getLogger(__name__)

_HALF_WRITTEN = re.compile(r"\.tmp-.+\.jsonl?-[0-9]+")


def write_atomically(path: Path, text: str) -> None:
    """Write a file under another name, sync it to disk, and only then give it its own.

    Raises:
        OSError: the file could not be written; an older one of this name is intact.
    """
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def remove_half_written(folder: Path) -> None:
    """Remove the JSON files in ``folder`` that a killed program was writing."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _HALF_WRITTEN.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            logger.info("Removing %s, left by an earlier run.", path)
            path.unlink()
