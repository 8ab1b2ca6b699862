"""Latents of images in buckets: a cache for each size, in one folder.

<folder>/512x768/, ...    the images that are cut to this height and width
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusers_curriculum.training.cache.latents import cache_latents
from diffusers_curriculum.training.cache.reading import CachedLatents
from diffusers_curriculum.training.data.buckets import Buckets
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.storage.fingerprints import hash_config

_OWN = re.compile(r"(\.tmp-)?\d+x\d+")


@dataclass(frozen=True, eq=False)
class BucketedLatents:
    """Latents on disk, by the row of the data set.

    Attributes:
        caches: of each bucket.
        of_row: (n,) the bucket of each row.
        place: (n,) the row's number in its bucket.
    """

    caches: tuple[CachedLatents, ...]
    of_row: NDArray[Any]
    place: NDArray[Any]

    def read(self, row: int, u_crop: float, u_flip: float) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation (C, h, w) of a variant; see :meth:`CachedLatents.read`."""
        cache, place = self._at(row)
        return cache.read(place, u_crop, u_flip)

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of the image of a row, of caches that have the sizes."""
        cache, place = self._at(row)
        return cache.size(place)

    def draws(self, row: int, u_crop: float, u_flip: float) -> tuple[float, float, float]:
        """The uniforms by which an ``ImageTransform`` made the variant that :meth:`read` gives."""
        cache, place = self._at(row)
        return cache.draws(place, u_crop, u_flip)

    def _at(self, row: int) -> tuple[CachedLatents, int]:
        return self.caches[self.of_row[row]], int(self.place[row])


def cache_bucketed_latents(
    rows: Any,
    space: Any,
    transform: ImageTransform,
    *,
    buckets: Buckets,
    folder: str | Path,
    fingerprint: Mapping[str, Any],
    **options: Any,
) -> BucketedLatents:
    """As :func:`cache_latents`, with every image cut to the size of its bucket.

    Args:
        rows: a data set, which can ``select`` some of them.
        options: further ones of :func:`cache_latents`.

    Raises:
        UsageError: as there; the folder holds something else than such caches.
        DiskFullError: the disk filled up meanwhile.
    """
    root, place = Path(folder), np.empty(len(buckets.of_row), dtype=np.int64)
    strange = [path for path in _listed(root) if not _OWN.fullmatch(path.name)]
    if strange:
        raise UsageError(
            f"{root} holds {strange[0].name}, which is no latent cache of a bucket: give another "
            "folder."
        )
    caches = []
    for (width, height), own in zip(buckets.sizes, buckets.rows, strict=True):
        place[own] = np.arange(len(own))
        caches.append(
            cache_latents(
                rows.select(own),
                space,
                transform.of_size((width, height)),
                folder=root / f"{height}x{width}",
                fingerprint={**fingerprint, "in_bucket": hash_config(own.tolist())},
                **options,
            )
        )
    return BucketedLatents(tuple(caches), buckets.of_row, place)


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else [folder] * folder.exists()
