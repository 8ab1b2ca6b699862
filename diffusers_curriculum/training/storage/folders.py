"""The folders of checkpoints: their names, how one is published, which go, what a crash leaves.

Names inside the output folder, all on one file system:

    checkpoint-<step>              a whole checkpoint
    .tmp-checkpoint-<step>-<pid>   being written or being deleted: worthless after a crash
    .old-checkpoint-<step>-<pid>   moved aside while a new one takes its name: restored if need be

A whole output folder that is moved aside is called NAME.old-1, NAME.old-2, ... beside the new one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import shutil
from pathlib import Path

from diffusers_curriculum.training.errors import CheckpointError
from diffusers_curriculum.training.storage.files import remove_half_written
from diffusers_curriculum.training.storage.manifest import verify_checkpoint

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_OURS = re.compile(r"\.(tmp|old)-(checkpoint-[0-9]+)-[0-9]+")


def publish(folder: Path, final: Path) -> None:
    """Give a finished folder its name; a folder that has the name already goes last."""
    old = aside(final, "old")
    try:
        if final.exists():
            os.replace(final, old)
        os.replace(folder, final)
    except BaseException:
        if old.exists() and not final.exists():
            os.replace(old, final)
        raise
    _sync(final.parent)
    if old.exists():
        _discard(old, final)


def rotate(saved: Path, total_limit: int | None) -> None:
    """Delete the oldest checkpoints until ``total_limit`` are left; never the one just saved.

    A later one, of a run that this one repeats from an earlier step, goes only if it is damaged or
    not the newest.
    """
    found = checkpoints(saved.parent)
    surplus = len(found) - total_limit if total_limit is not None else 0
    for folder in [f for f in found if f != saved][: max(surplus, 0)]:
        if folder == found[-1] and _is_whole(folder):
            logger.warning("Kept %s: it is newer than %s, just saved.", folder, saved.name)
        else:
            _discard(folder, folder)


def _discard(folder: Path, final: Path) -> None:
    """Delete a folder under a temporary name, so that a half-deleted one is never mistaken."""
    doomed = aside(final, "tmp")
    try:
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:  # a failed clean-up must not end a run whose new checkpoint is safe
        logger.warning("Could not delete %s: %s", folder, error)


def clean_temporary(output_dir: str | Path) -> None:
    """Clear up what a killed run left; call it at start, on the main process, before resuming.

    A checkpoint that had been moved aside gets its name back if no new one took it.
    """
    root = Path(output_dir)
    remove_half_written(root)
    for path in sorted(root.iterdir(), reverse=True) if root.is_dir() else ():
        name = _OURS.fullmatch(path.name)
        if not name or not is_real_folder(path):
            continue
        if name[1] == "old" and not os.path.lexists(root / name[2]):
            os.replace(path, root / name[2])
            logger.warning("Restored %s, which a killed save had moved aside.", root / name[2])
        else:
            logger.info("Removing %s, left by an earlier run.", path)
            _discard(path, root / name[2])


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders named exactly ``checkpoint-<step>``, oldest first; no links, no other names."""
    root = Path(output_dir)
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    steps = sorted(int(m[1]) for m in map(_CHECKPOINT.fullmatch, names) if m)
    folders = (root / f"checkpoint-{step}" for step in steps)
    return [folder for folder in folders if is_real_folder(folder)]


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        return bool(verify_checkpoint(folder))
    return False


def move_aside(folder: Path) -> Path:
    """Give a folder the first free name of NAME.old-1, NAME.old-2, ...; returns where it is now."""
    free = (folder.with_name(f"{folder.name}.old-{number}") for number in itertools.count(1))
    target = next(path for path in free if not os.path.lexists(path))
    os.replace(folder, target)
    return target


def is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def aside(final: Path, kind: str) -> Path:
    return final.with_name(f".{kind}-{final.name}-{os.getpid()}")


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below, then the folder itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder, and say so.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
