"""Which samples are looked at, and which of them by which process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from diffusers_curriculum.randomness import host_generator


@dataclass(frozen=True)
class Share:
    """The batches of one process: iterating gives lists of sample numbers.

    Attributes:
        first, last: sample numbers; the last one is not part of it.
        batch_size: a batch begins at each multiple of it.
        rows_per_process: of every process, filled or not, as gathering wants equal sizes.
    """

    first: int
    last: int
    batch_size: int
    rows_per_process: int

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.first, self.last, self.batch_size):
            yield list(range(start, min(start + self.batch_size, self.last)))


def share(count: int, batch_size: int, rank: int, processes: int) -> Share:
    """Return the whole batches that one of several processes takes; the last may get fewer."""
    batches = math.ceil(count / batch_size)
    rows = math.ceil(batches / processes) * batch_size
    first = min(count, rank * rows)
    return Share(first, min(count, first + rows), batch_size, rows)


def chosen_rows(count: int, wanted: int, seed: int) -> list[int]:
    """Return ``wanted`` of ``count`` rows, or all of them, in ascending order, by the seed."""
    generator = host_generator(seed, purpose="evaluation")
    return sorted(generator.permutation(count)[:wanted].tolist())
