"""Aspect-ratio buckets: images of like form are cut to one size, and a batch is of one bucket.

The images of each bucket are an endless sequence of permutations, cut into batches. Of a bucket of
m images epoch e takes the batches floor(e m / B) ... floor((e + 1) m / B) - 1; those of all buckets
are then permuted. So all batches are full, what remains of a bucket at the end of an epoch begins
its first batch of the next, and no image is ever more than one look ahead of another of its bucket.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from diffusers_curriculum.randomness import host_generator

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # (width, height) in pixels
_MOST = 2.0  # the longest side over the shortest, of an automatic list


@dataclass(frozen=True, eq=False)  # orders are remembered by it
class Buckets:
    """Sizes of images, and which of them make up a batch, as a function of a seed.

    Args:
        sizes: of each bucket.
        of_row: (n,) the bucket of each image; every bucket has some.
        batch: images of a micro-batch over all processes, B.
    """

    sizes: tuple[Size, ...]
    of_row: np.ndarray
    batch: int

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """The images of each bucket."""
        return [np.flatnonzero(self.of_row == bucket) for bucket in range(len(self.sizes))]

    @cached_property
    def counts(self) -> np.ndarray:
        """How many those are."""
        return np.array([len(rows) for rows in self.rows])

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed run is compared with."""
        sizes = (f"{height}x{width}" for width, height in self.sizes)
        return {"batch": self.batch} | dict(zip(sizes, self.counts.tolist(), strict=True))

    def size_of(self, row: int) -> Size:
        """What an image is cut to."""
        return self.sizes[self.of_row[row]]

    def row_at(self, seed: int, position: int) -> int:
        """The image at a position of the training sequence."""
        batch, place = divmod(position, self.batch)
        epoch = batch * self.batch // int(self.counts.sum())  # it begins at this batch, or before
        while self.batches_before(epoch + 1).sum() <= batch:
            epoch += 1
        own = batch - int(self.batches_before(epoch).sum())
        bucket, number = (int(each[own]) for each in _order_of_batches(seed, epoch, self))
        rows = self.rows[bucket]
        turn, entry = divmod(number * self.batch + place, len(rows))
        return int(rows[_turn(seed, bucket, turn, len(rows))[entry]])

    def batches_before(self, epoch: int) -> np.ndarray:
        """How many each bucket has before an epoch."""
        return epoch * self.counts // self.batch


@lru_cache(maxsize=3)
def _order_of_batches(seed: int, epoch: int, buckets: Buckets) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the bucket of each batch of an epoch, and its number among those of the bucket."""
    first, end = (buckets.batches_before(each) for each in (epoch, epoch + 1))
    of = host_generator(seed, epoch, purpose="bucket_order").permutation(
        np.repeat(np.arange(len(end)), end - first)
    )
    numbers = np.empty_like(of)
    for bucket in range(len(end)):
        numbers[of == bucket] = np.arange(first[bucket], end[bucket])
    return of, numbers


@lru_cache(maxsize=256)
def _turn(seed: int, bucket: int, turn: int, count: int) -> np.ndarray:
    """A permutation of the images of a bucket."""
    return host_generator(seed, bucket, turn, purpose="bucket_turn").permutation(count)


def even_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """Sizes of about resolution^2 pixels, up to twice as long as wide, of sides that are multiples
    of ``step``, or of as many of them as make a sixteenth of the resolution."""
    unit = step * max(1, round(resolution / 16 / step))
    sides = range(unit, math.ceil(resolution * _MOST) + 1, unit)
    sizes = ((w, max(unit, round(resolution**2 / w / unit) * unit)) for w in sides)
    return tuple(size for size in sizes if max(size) <= _MOST * min(size))


def filled_buckets(images: np.ndarray, sizes: Sequence[Size], batch: int) -> Buckets:
    """The buckets of images (n, 2) by their width and height: of each the nearest by the logarithm
    of width / height, among those of one form by that of the area. Buckets with fewer images than a
    batch, the smallest first, leave them to the others, which is logged."""
    of_row, left = _nearest(images, sizes), set(range(len(sizes)))
    wanted = of_row.copy()
    while True:
        counts = np.bincount(of_row, minlength=len(sizes))
        left = {bucket for bucket in left if counts[bucket]}
        least = min(left, key=lambda bucket: (counts[bucket], bucket))
        if counts[least] >= batch or len(left) == 1:
            break
        left.remove(least)
        others, moved = sorted(left), of_row == least
        nearest = _nearest(images[moved], [sizes[bucket] for bucket in others])
        of_row[moved] = np.array(others)[nearest]
    if elsewhere := int((of_row != wanted).sum()):
        told = (
            "%d of %d images are cut to another size than the nearest, as fewer than the %d of a "
        )
        logger.info(told + "batch have that", elsewhere, len(images), batch)
    kept = sorted(left)
    return Buckets(tuple(sizes[bucket] for bucket in kept), np.searchsorted(kept, of_row), batch)


def _nearest(images: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    logs, nearest = np.log(images.astype(np.float64)), np.zeros(len(images), dtype=np.int64)
    least = np.full(len(images), np.inf)
    for bucket, (width, height) in enumerate(sizes):
        wide, high = logs[:, 0] - math.log(width), logs[:, 1] - math.log(height)
        distance = np.abs(wide - high) + 1e-6 * np.abs(wide + high)
        closer = distance < least
        least[closer], nearest[closer] = distance[closer], bucket
    return nearest
