"""A latent cache on disk, how it is read and checked: ``manifest.json, mean.npy, std.npy``, and
``verified.json``, which tells what the files were like when their digests were last compared."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.training.errors import CheckpointError, UsageError
from diffusers_curriculum.training.storage.files import write_atomically
from diffusers_curriculum.training.storage.fingerprints import flattened
from diffusers_curriculum.training.storage.manifest import MANIFEST, find_faults, read_manifest

logger = logging.getLogger(__name__)

MEAN, STD = "mean.npy", "std.npy"
_VERIFIED = "verified.json"


@dataclass(frozen=True)
class CachedLatents:
    """Latents on disk; every process that reads maps the files for itself."""

    folder: Path
    fingerprint: Mapping[str, Any]  # what it was made from

    @cached_property
    def mean(self) -> NDArray[Any]:
        """(N, crops, flips, C, h, w), mapped read-only."""
        return np.load(self.folder / MEAN, mmap_mode="r", allow_pickle=False)

    @cached_property
    def std(self) -> NDArray[Any] | None:
        """As `mean`; None where the encoder has no deviation."""
        path = self.folder / STD
        return np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None

    def __len__(self) -> int:
        return len(self.mean)

    def __reduce__(self) -> tuple[Any, ...]:
        # a map would travel to loader workers as a copy of the whole file
        return CachedLatents, (self.folder, dict(self.fingerprint))

    def read(self, row: int, u_crop: float, u_flip: float) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation (C, h, w), float32, of the variant that two uniforms in [0, 1) select.

        As in ``ImageTransform``, an image is mirrored where ``u_flip < 1/2``, if at all.

        Raises:
            IndexError: there is no such row.
        """
        variant = self._variant(row, u_crop, u_flip)
        deviation = None if self.std is None else _tensor(self.std[variant])
        return _tensor(self.mean[variant]), deviation

    def draws(self, row: int, u_crop: float, u_flip: float) -> tuple[float, float, float]:
        """The uniforms by which an ``ImageTransform`` made the variant that :meth:`read` gives."""
        _, crop, mirrored = self._variant(row, u_crop, u_flip)
        top, left = crop_draws(self.fingerprint["seed"], row * self.mean.shape[1] + crop)
        return top, left, 0.0 if mirrored else 1.0

    def _variant(self, row: int, u_crop: float, u_flip: float) -> tuple[int, int, int]:
        count, crops, flips = self.mean.shape[:3]
        if not 0 <= row < count:
            raise IndexError(f"row {row} is not in the latent cache, which has {count} rows.")
        return row, int(u_crop * crops), int(flips == 2 and u_flip < 0.5)


def crop_draws(seed: int | None, crop: int) -> tuple[float, float]:
    """The two uniforms, from top and from left, of a crop; they are counted on over the rows."""
    u_top, u_left = host_generator(seed or 0, crop, purpose="latent_crop").random(2).tolist()
    return u_top, u_left


def open_cache(
    folder: Path, fingerprint: Mapping[str, Any], hashes: bool = True
) -> CachedLatents | None:
    """The cache in a folder, None where there is none yet.

    Args:
        hashes: compare the files' SHA-256, unless they are as they were when it was last compared;
            otherwise only their sizes.

    Raises:
        UsageError: it was made from something else, is damaged, or is no cache.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} exists and is no latent cache: give another folder.")
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        raise UsageError(f"{folder / MANIFEST} is damaged: delete {folder}.") from None
    if "latents" not in manifest["facts"]:
        raise UsageError(f"{folder} is a checkpoint and no latent cache: give another folder.")
    saved = manifest["facts"]["latents"]
    _refuse_other(folder, saved, fingerprint)
    files = manifest["files"]
    known = not hashes or _were_verified(folder, files)
    faults = _wrong_sizes(folder, files) if known else find_faults(folder, manifest)
    if faults:
        raise UsageError(
            f"The latent cache {folder} is damaged: {'; '.join(faults)}. Delete it, and it is made "
            "again."
        )
    if not known:
        remember_verified(folder, files)
    return CachedLatents(folder, saved)


def remember_verified(folder: Path, files: Iterable[str]) -> None:
    """Note that the files are what the manifest says, so that the next start need not read them.

    A folder that cannot be written to is read at each start.
    """
    try:
        write_atomically(folder / _VERIFIED, json.dumps(_stamps(folder, files)))
    except OSError as error:
        logger.warning("The next start reads all of %s again: %s", folder, error)


def _were_verified(folder: Path, files: Iterable[str]) -> bool:
    try:
        return json.loads((folder / _VERIFIED).read_bytes()) == _stamps(folder, files)
    except (OSError, ValueError, RecursionError):
        return False


def _stamps(folder: Path, files: Iterable[str]) -> dict[str, list[int]]:
    """Size of each file, and when its content and its state last changed; the latter time is one
    that no copying sets back."""
    stats = {name: os.stat(folder / name) for name in files}
    return {name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats.items()}


def _refuse_other(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    old, new = ({k: v for n in part for k, v in flattened(part[n], n)} for part in (saved, wanted))
    names = sorted(name for name in old | new if old.get(name) != new.get(name))
    if names:
        told = "; ".join(f"{name}: {old.get(name)!r}, now {new.get(name)!r}" for name in names)
        raise UsageError(
            f"The latent cache {folder} was made from something else ({told}). Give another "
            "folder, or delete it."
        )


def _wrong_sizes(folder: Path, files: Mapping[str, Any]) -> list[str]:
    sizes = {name: size_of(folder / name) for name in files}
    return [
        f"{name} has {sizes[name]} bytes instead of {entry['size']}"
        for name, entry in files.items()
        if sizes[name] != entry["size"]
    ]


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
