"""Files of arrays of one shape, made in their full size and filled batch by batch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusers_curriculum.training.cache.files import LATENTS, size_of
from diffusers_curriculum.training.cache.filling import WorkFolder
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.storage.files import disk_full_explained

_COMMIT_EVERY = 16  # batches between two syncs to disk


class Array(NamedTuple):
    """What a file has of each image."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of one image."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Layout(NamedTuple):
    """Shape and dtype of the files of a latent cache.

    Attributes:
        variants: rows, crops, flips: the first axes of all files.
        files: by name.
    """

    variants: tuple[int, int, int]
    files: Mapping[str, Array]

    @property
    def images(self) -> int:
        """How many encodings there are."""
        return int(np.prod(self.variants))

    @property
    def nbytes(self) -> int:
        """Bytes of all files, their short headers aside."""
        return self.images * sum(array.nbytes for array in self.files.values())


class ArrayFolder(WorkFolder):
    """Where a latent cache is filled; beside its files, ``done`` has a byte for each batch.

    Args:
        layout: of the files.
        batch_size: images of a batch.
    """

    def __init__(
        self, final: Path, fingerprint: Mapping[str, Any], layout: Layout, batch_size: int
    ) -> None:
        self.layout, self.batch_size = layout, batch_size
        super().__init__(
            final, LATENTS, fingerprint, -(-layout.images // batch_size), layout, batch_size
        )

    def require_space(self) -> None:
        """Compare what is still to be written with what is free."""
        needed, free = self.layout.nbytes, shutil.disk_usage(self.final.parent).free
        if self.is_fit():
            needed -= self.layout.nbytes * sum(self.done()) // self.batches
        if free < needed:
            raise UsageError(
                f"The latent cache {self.final} needs {needed:,} more bytes, {free:,} are free: "
                "free some space, give a folder on another disk, or keep fewer crops, no mirrored "
                "images, or float16."
            )

    def make_files(self) -> None:
        for name, (dtype, shape) in self.layout.files.items():
            whole = (*self.layout.variants, *shape)
            np.lib.format.open_memmap(
                self.files / name, mode="w+", dtype=np.dtype(dtype), shape=whole
            )
        (self.folder / "done").write_bytes(bytes(self.batches))

    def done(self) -> bytes:
        return (self.folder / "done").read_bytes()

    def is_fit(self) -> bool:
        data = {name: self.layout.images * a.nbytes for name, a in self.layout.files.items()}
        return (
            super().is_fit()
            and size_of(self.folder / "done") == self.batches
            # the header is short
            and all(size < size_of(self.files / n) < size + 4096 for n, size in data.items())
        )


class ArrayWriter:
    """Writes batches into the files of an :class:`ArrayFolder`; a context manager.

    Files are written to and not mapped: on a full disk a write raises, a map ends the process, and
    processes on several machines would overwrite each other's parts of a page.

    Raises:
        DiskFullError: no space; what is whole stays for a later run.
    """

    def __init__(self, work: ArrayFolder) -> None:
        self.work, self.pending = work, list[int]()

    def __enter__(self) -> ArrayWriter:
        layout = self.work.layout
        self.files = {
            name: open(self.work.files / name, "r+b", buffering=0)  # noqa: SIM115
            for name in layout.files
        }
        self.headers = {
            name: size_of(self.work.files / name) - layout.images * array.nbytes
            for name, array in layout.files.items()
        }
        self.flags = open(self.work.folder / "done", "r+b", buffering=0)
        return self

    def __exit__(self, kind: object, *unused: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for file in (*self.files.values(), self.flags):
                file.close()

    def write(self, batch: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write one batch, an array (b, ...) for each file."""
        layout, first = self.work.layout, batch * self.work.batch_size
        with disk_full_explained(self.work.final, layout.nbytes):
            for name, array in layout.files.items():
                data = np.ascontiguousarray(arrays[name], dtype=np.dtype(array.dtype))
                start = self.headers[name] + first * array.nbytes
                _write_at(self.files[name], start, data.reshape(-1).view(np.uint8).data)
            self.pending.append(batch)
            if len(self.pending) == _COMMIT_EVERY:
                self._commit()

    def _commit(self) -> None:
        """A batch counts as done only after it is on disk."""
        for file in self.files.values():
            os.fsync(file.fileno())
        for batch in self.pending:
            _write_at(self.flags, batch, memoryview(b"\1"))
        os.fsync(self.flags.fileno())
        self.pending.clear()


def _write_at(file: Any, offset: int, data: memoryview) -> None:
    file.seek(offset)
    while data:
        data = data[file.write(data) :]
