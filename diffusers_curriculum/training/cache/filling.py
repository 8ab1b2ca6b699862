"""How a latent cache is filled, by one process or several, and gets its name when it is whole.

.tmp-<folder>/plan.json, done, files/    what a killed run leaves and a later one goes on with
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusers_curriculum.training.cache.files import MEAN, STD, remember_verified, size_of
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.storage.files import disk_full_explained, write_atomically
from diffusers_curriculum.training.storage.folders import publish, sync_tree
from diffusers_curriculum.training.storage.manifest import write_manifest

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}
_COMMIT_EVERY = 16  # batches between two syncs to disk


class Layout(NamedTuple):
    """Shape and dtype of the files of a cache."""

    shape: tuple[int, ...]
    dtype: str
    has_std: bool

    @property
    def images(self) -> int:
        """How many encodings there are: rows x crops x flips."""
        return int(np.prod(self.shape[:3]))

    @property
    def names(self) -> list[str]:
        return [MEAN, STD] if self.has_std else [MEAN]

    @property
    def image_bytes(self) -> int:
        """Bytes of one encoding in one file."""
        return int(np.prod(self.shape[3:])) * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all files, their short headers aside."""
        return len(self.names) * self.images * self.image_bytes


class WorkFolder:
    """Where a cache is filled, batch by batch, by one process or several.

    Args:
        final: folder of the cache to be.
        fingerprint, layout, batch_size: what it is made from; what is there of another making is
            thrown away.
    """

    def __init__(
        self, final: Path, fingerprint: Mapping[str, Any], layout: Layout, batch_size: int
    ) -> None:
        self.final, self.layout, self.batch_size = final, layout, batch_size
        self.folder = final.with_name(f".tmp-{final.name}")
        self.files = self.folder / "files"
        self.fingerprint = dict(fingerprint)
        self.batches = -(-layout.images // batch_size)
        plan = [self.fingerprint, list(layout.shape), layout.dtype, layout.has_std, batch_size]
        self.plan = json.dumps(plan, sort_keys=True)

    def require_space(self) -> None:
        """Compare what is still to be written with what is free."""
        self.final.parent.mkdir(parents=True, exist_ok=True)
        needed, free = self.layout.nbytes, shutil.disk_usage(self.final.parent).free
        if self._is_fit():
            needed -= self.layout.nbytes * sum(self.done()) // self.batches
        if free < needed:
            raise UsageError(
                f"The latent cache {self.final} needs {needed:,} more bytes, {free:,} are free: "
                "free some space, give a folder on another disk, or keep fewer crops, no mirrored "
                "images, or float16."
            )

    def prepare(self) -> None:
        """Make the folder and its empty files, unless they are there already; one process only."""
        if self._is_fit():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.files.mkdir(parents=True)
        for name in self.layout.names:
            dtype, shape = DTYPES[self.layout.dtype], self.layout.shape
            np.lib.format.open_memmap(self.files / name, mode="w+", dtype=dtype, shape=shape)
        (self.folder / "done").write_bytes(bytes(self.batches))
        write_atomically(self.folder / "plan.json", self.plan)

    def done(self) -> bytes:
        """A byte for each batch: 1 where it is on disk."""
        return (self.folder / "done").read_bytes()

    def publish(self) -> None:
        """Hash the files and give the cache its name; one process only."""
        missing = self.done().count(0)
        if missing:
            raise UsageError(
                f"{missing} of {self.batches} batches are not in {self.folder}: all processes must "
                "see the same folder; put it on a disk that they share."
            )
        write_manifest(self.files, 0, {"latents": self.fingerprint})
        sync_tree(self.files)
        publish(self.files, self.final)
        remember_verified(self.final, self.layout.names)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_fit(self) -> bool:
        """Whether the folder is of this plan and its files have their sizes."""
        plan, own = self.folder / "plan.json", self.layout
        sizes = [size_of(self.files / name) for name in own.names]
        data = own.images * own.image_bytes
        return (
            plan.is_file()
            and plan.read_text("utf-8") == self.plan
            and size_of(self.folder / "done") == self.batches
            and all(data < size < data + 4096 for size in sizes)  # the header is short
        )


class LatentWriter:
    """Writes batches into the files of a :class:`WorkFolder`; a context manager.

    Files are written to and not mapped: on a full disk a write raises, a map ends the process, and
    processes on several machines would overwrite each other's parts of a page.

    Raises:
        DiskFullError: no space; what is whole stays for a later run.
    """

    def __init__(self, work: WorkFolder) -> None:
        self.work, self.pending = work, list[int]()

    def __enter__(self) -> LatentWriter:
        names, size = self.work.layout.names, self.work.layout.images * self.work.layout.image_bytes
        paths = [self.work.files / name for name in names]
        self.headers = [size_of(path) - size for path in paths]
        self.files = [open(path, "r+b", buffering=0) for path in paths]  # noqa: SIM115
        self.flags = open(self.work.folder / "done", "r+b", buffering=0)
        return self

    def __exit__(self, kind: object, *unused: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for file in (*self.files, self.flags):
                file.close()

    def write(self, batch: int, *arrays: NDArray[Any]) -> None:
        """Write the encodings of one batch, an array (b, C, h, w) for each file."""
        start = batch * self.work.batch_size * self.work.layout.image_bytes
        with disk_full_explained(self.work.final, self.work.layout.nbytes):
            for file, header, array in zip(self.files, self.headers, arrays, strict=True):
                _write_at(file, header + start, array.reshape(-1).view(np.uint8).data)
            self.pending.append(batch)
            if len(self.pending) == _COMMIT_EVERY:
                self._commit()

    def _commit(self) -> None:
        """A batch counts as done only after it is on disk."""
        for file in self.files:
            os.fsync(file.fileno())
        for batch in self.pending:
            _write_at(self.flags, batch, memoryview(b"\1"))
        os.fsync(self.flags.fileno())
        self.pending.clear()


def _write_at(file: Any, offset: int, data: memoryview) -> None:
    file.seek(offset)
    while data:
        data = data[file.write(data) :]
