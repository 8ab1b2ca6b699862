"""Checkpoints that survive kills, full disks and flipped bits.

A checkpoint is written aside, hashed, synced to disk, renamed, and only then do old ones go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers_curriculum.models.saving import share_weights
from diffusers_curriculum.training.arguments.environment import checkpoint_path
from diffusers_curriculum.training.checkpoint.record import FILE as RUN_FILE
from diffusers_curriculum.training.errors import CheckpointError, DiskFullError, UsageError
from diffusers_curriculum.training.storage.files import FULL
from diffusers_curriculum.training.storage.folders import (
    aside,
    checkpoints,
    clean_temporary,
    is_real_folder,
    move_aside,
    publish,
    rotate,
    sync_tree,
)
from diffusers_curriculum.training.storage.manifest import verify_checkpoint, write_manifest

logger = logging.getLogger(__name__)


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    write: Callable[[Path], object],
    facts: Mapping[str, Any],
    total_limit: int | None = None,
    bytes_needed: int | None = None,
) -> Path:
    """Save ``output_dir/checkpoint-<step>`` whole or not at all; call it on the main process only.

    Args:
        write: gets an empty folder and writes the artefacts into it.
        facts: plain data for the manifest (world size, config hash).
        total_limit: how many checkpoints stay; older ones are deleted after the save.
        bytes_needed: size to come, if known: too little space is then noticed before writing.

    Raises:
        DiskFullError: no space; what was written is removed, older checkpoints are untouched.
        UsageError: a bad ``total_limit`` or ``step``.
        CheckpointError: the name is taken by something that is not a folder.
    """
    if total_limit is not None and total_limit < 1:
        raise UsageError(f"total_limit={total_limit} must be at least 1, or None to keep all.")
    if step < 0:
        raise UsageError(f"step={step} must not be negative.")
    root = Path(output_dir).resolve()
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"checkpoint-{step}"
    if os.path.lexists(final) and not is_real_folder(final):
        raise CheckpointError(f"{final} exists and is not a folder: move it away.")
    with _written_aside(final, bytes_needed) as folder:
        write(folder)
        share_weights(folder)
        write_manifest(folder, step, facts)
        sync_tree(folder)
        publish(folder, final)
    rotate(final, total_limit)
    return final


@contextlib.contextmanager
def _written_aside(final: Path, bytes_needed: int | None) -> Iterator[Path]:
    """A temporary folder beside ``final`` that is gone afterwards, whatever happens."""
    folder = aside(final, "tmp")
    try:
        free = shutil.disk_usage(final.parent).free
        if free < (bytes_needed or 0):
            raise DiskFullError(final, bytes_needed or 0, free, "checked before writing")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    except Exception as error:
        if _error_number(error) not in FULL or isinstance(error, DiskFullError):
            raise
        free = shutil.disk_usage(final.parent).free
        needed = bytes_needed or max(map(_size, [folder, *checkpoints(final.parent)]))
        raise DiskFullError(final, needed, free, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _error_number(error: Exception) -> int | None:
    """The errno of an error; safetensors has it only in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\((?:os error |Os \{ code: )(\d+)", str(error))
    return int(found[1]) if found else None


def clear_output(output_dir: str | Path, overwrite: bool = False) -> None:
    """Clear up what a killed save left in an output folder; the main process does it first of all.

    Args:
        overwrite: move a run that is there aside, and make an empty folder in its place.
    """
    clean_temporary(output_dir)
    root = Path(output_dir).resolve()
    if overwrite and (checkpoints(root) or (root / RUN_FILE).exists()):
        target = move_aside(root)
        root.mkdir()
        logger.warning("Moved the run in %s aside: it is in %s now.", root, target)


def check_not_mixed(output_dir: str | Path, checkpoint: Path | None, request: str | None) -> None:
    """Refuse to save among the checkpoints of another run.

    Args:
        checkpoint: the one that is resumed, if any; ``request``: as it was asked for.

    Raises:
        UsageError: ``output_dir`` holds checkpoints of a run that this one does not go on with.
    """
    root = Path(output_dir).resolve()
    found = checkpoints(root)
    same_run = request == "latest" if checkpoint is None else checkpoint.parent == root
    if found and not same_run:
        raise UsageError(
            f"--output_dir {output_dir} holds {len(found)} checkpoints of another run, the newest "
            f"{found[-1].name}: go on with it by --resume_from_checkpoint latest, move it aside by "
            "--overwrite_output_dir, or give another folder."
        )


def find_checkpoint(output_dir: str | Path, request: str) -> Path | None:
    """The checkpoint to resume from, verified.

    Args:
        request: "latest": the newest whole one in ``output_dir``, None if there is none; damaged
            ones are skipped with a warning. A name without separator: that one in ``output_dir``.
            Anything else: a path, taken literally.

    Raises:
        CheckpointError: a checkpoint asked for by name is missing or damaged.
    """
    if request == "latest":
        return _latest(Path(output_dir).resolve())
    path = checkpoint_path(str(output_dir), request)
    if not path.is_dir():
        raise CheckpointError(
            f"The checkpoint {request!r} does not exist: there is no folder {path}. Give latest, "
            f"a name inside {Path(output_dir).resolve()}, or the path of a checkpoint."
        )
    return _verified(path)


def _latest(output_dir: Path) -> Path | None:
    for folder in reversed(checkpoints(output_dir)):
        try:
            return _verified(folder)
        except CheckpointError as error:
            logger.warning("Skipped %s: %s", folder.name, error)
    logger.info("No whole checkpoint in %s: starting from the beginning.", output_dir)
    return None


def _verified(folder: Path) -> Path:
    verify_checkpoint(folder)
    logger.info("Resuming from %s.", folder)
    return folder


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
