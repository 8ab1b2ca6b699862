"""Which sample is seen when, as pure arithmetic: there is no loader state to save or to lose.

Optimizer step s consumes the positions s * total ... (s + 1) * total - 1 of one endless sequence;
position p stands for the (p mod n)-th entry of the permutation of epoch p // n. Batches run across
epoch edges, so all are full. Resuming is starting at another step, and one process or eight see
the same global batches.

With m class images for prior preservation (arXiv 2208.12242) position 2 q is the q-th sample as
above, and 2 q + 1 the class image beside it: the (q mod m)-th entry of another permutation.

Of several sources, each is an endless sequence of permutations of its rows, of which epoch e takes
the next d, its draws e d ... (e + 1) d - 1, whatever its number of rows; those of all sources are
then permuted. So no image of a source is ever more than one draw ahead of another.

Samples in shards are permuted so that few shards are read at a time: first the shards, then their
samples within stretches of so many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from diffusers_curriculum.randomness import Slots, host_generator
from diffusers_curriculum.training.data.buckets import Buckets


@lru_cache(maxsize=4)  # a batch touches at most two neighbouring epochs of each in the usual case
def _permutation(seed: int, epoch: int, count: int, purpose: str) -> np.ndarray:
    order = host_generator(seed, epoch, purpose=purpose).permutation(count)
    order.setflags(write=False)
    return order


class SourceShare(NamedTuple):
    """What one of several sources has."""

    rows: int  # of the data set, after those of the sources before it
    draws: int  # of an epoch


@lru_cache(maxsize=3)
def _order_of_sources(seed: int, epoch: int, sources: tuple[SourceShare, ...]) -> np.ndarray:
    """The rows of an epoch."""
    parts, before = [], 0
    for number, (rows, draws) in enumerate(sources):
        first = epoch * draws
        turns = range(first // rows, (first + draws - 1) // rows + 1)
        keys = ((seed, number, turn) for turn in turns)
        turned = [host_generator(*key, purpose="source_order").permutation(rows) for key in keys]
        start = first - turns.start * rows
        parts.append(before + np.concatenate(turned)[start : start + draws])
        before += rows
    drawn = np.concatenate(parts)
    order = drawn[host_generator(seed, epoch, purpose="data_order").permutation(len(drawn))]
    order.setflags(write=False)
    return order


@dataclass(frozen=True, eq=False)  # orders are remembered by it, and it may be long
class Shards:
    """Samples that lie in shards, in their order.

    Attributes:
        counts: of the samples in each.
        buffer: how many samples are shuffled among one another.
    """

    counts: tuple[int, ...]
    buffer: int


@lru_cache(maxsize=2)
def _order_of_shards(seed: int, epoch: int, shards: Shards) -> np.ndarray:
    """The rows of an epoch."""
    draw = host_generator(seed, epoch, purpose="shard_order")
    ends = np.cumsum(shards.counts).tolist()
    turn = draw.permutation(len(ends)).tolist()
    order = np.concatenate([np.arange(ends[s] - shards.counts[s], ends[s]) for s in turn])
    cut = int(draw.integers(shards.buffer)) if shards.buffer < len(order) else 0
    for first in range(-cut, len(order), shards.buffer):
        draw.shuffle(order[max(first, 0) : first + shards.buffer])
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class BatchPlan:
    """The order of the samples for one rank, a pure function of its numbers.

    Raises:
        ValueError: a count below 1, or a rank outside [0, world_size).
    """

    num_samples: int  # n
    batch_size: int  # samples per rank and micro-batch, class images not counted
    accumulation: int  # micro-batches per optimizer step
    world_size: int
    rank: int
    seed: int
    num_class_images: int = 0  # m, the rows after those of the samples
    sources: tuple[SourceShare, ...] = ()  # of the samples, where there are several
    shards: Shards | None = None  # of the samples, where they are read from such
    buckets: Buckets | None = None  # of the samples, where a batch is of one size

    def __post_init__(self) -> None:
        for field in fields(self)[:4]:
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; it must lie in [0, {self.world_size}).")
        if self.sources and sum(source.rows for source in self.sources) != self.num_samples:
            raise ValueError(f"{self.sources} do not have {self.num_samples} rows.")
        if self.shards is not None and sum(self.shards.counts) != self.num_samples:
            raise ValueError(f"the shards do not have {self.num_samples} rows.")
        if self.buckets is not None and self.buckets.batch != self.total // self.accumulation:
            raise ValueError(f"{self.buckets.batch} is not the batch of all processes.")

    @property
    def facts(self) -> dict[str, Any]:
        """What of the order a resumed run is compared with, besides seed and batch."""
        found = {} if self.shards is None else {"shuffle_buffer": self.shards.buffer}
        return found if self.buckets is None else found | {"buckets": self.buckets.facts}

    @property
    def each(self) -> int:
        """Return the number of positions of a sample: 2 where a class image stands beside it."""
        return 2 if self.num_class_images else 1

    @property
    def epoch(self) -> int:
        """Return the number of positions of an epoch, in which every sample is seen once, or as
        often as its source says."""
        return self._drawn * self.each

    @property
    def _drawn(self) -> int:
        """Return the number of samples of an epoch, class images not counted."""
        return sum(source.draws for source in self.sources) or self.num_samples

    @property
    def total(self) -> int:
        """Return the positions of one optimizer step, over all ranks and micro-batches."""
        return self.batch_size * self.each * self.accumulation * self.world_size

    def slots(self, micro: int) -> Slots:
        """Return which slots of the global batch this rank's micro-batch `micro` holds.

        slot(micro a, rank r, i) = a * b * world_size + r * b + i with b = batch_size * each;
        ValueError for a `micro` outside [0, accumulation).
        """
        if not 0 <= micro < self.accumulation:
            raise ValueError(f"micro is {micro}; it must lie in [0, {self.accumulation}).")
        return Slots.of(
            self.batch_size * self.each,
            rank=self.rank,
            world_size=self.world_size,
            micro_step=micro,
            accumulation=self.accumulation,
        )

    def positions(self, step: int, micro: int) -> range:
        """Return the sample positions p = step * total + slot of this rank's micro-batch;
        ValueError for a negative `step`, or a `micro` outside [0, accumulation)."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0.")
        slots = self.slots(micro)
        first = step * self.total + slots.start
        return range(first, first + slots.count)

    def index(self, position: int) -> int:
        """Return the data set row at `position`, which a bucket's order tells where there are such:
        permutation(seed, p // n)[p mod n], and with class
        images, several sources or shards as the module says."""
        if self.buckets is not None:
            return self.buckets.row_at(self.seed, position)
        number, beside = divmod(position, self.each)
        first, count, purpose = 0, self.num_samples, "data_order"
        if self.sources and not beside:
            epoch, place = divmod(number, self._drawn)
            return int(_order_of_sources(self.seed, epoch, self.sources)[place])
        if beside:
            first, count, purpose = self.num_samples, self.num_class_images, "class_order"
        epoch, place = divmod(number, count)
        if self.shards is not None and not beside:
            return int(_order_of_shards(self.seed, epoch, self.shards)[place])
        return first + int(_permutation(self.seed, epoch, count, purpose)[place])

    @property
    def shares_of_sources(self) -> list[float]:
        """Return the share of each source among all positions."""
        return [source.draws / self.epoch for source in self.sources]

    def sources_at(self, step: int, slots: Slots) -> np.ndarray:
        """Return the number of each slot's source (B,), counted from 0; -1 for a class image."""
        first = step * self.total + slots.start
        return self._sources_of(np.arange(first, first + slots.count))

    def sources_observed(self, step: int) -> np.ndarray:
        """Return the same of a whole step (N,) in the order in which its losses are gathered: of
        each rank all micro-batches, one after the other."""
        slots = np.arange(self.total).reshape(self.accumulation, self.world_size, -1)
        return self._sources_of(step * self.total + slots.swapaxes(0, 1).reshape(-1))

    def _sources_of(self, positions: np.ndarray) -> np.ndarray:
        number, beside = np.divmod(positions, self.each)
        epochs, place = np.divmod(number, self._drawn)
        rows = np.empty_like(place)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = _order_of_sources(self.seed, epoch, self.sources)[place[here]]
        ends = np.cumsum([source.rows for source in self.sources])
        return np.where(beside == 1, -1, np.searchsorted(ends, rows, side="right"))

    def epochs_finished(self, step: int) -> int:
        """Return how many epochs are complete once `step` has been done."""
        return (step + 1) * self.total // self.epoch

    def epoch_is_due(self, done: int, every: int) -> bool:
        """Return whether the last of ``done`` steps ended an epoch whose number is a multiple of
        ``every``."""
        before = self.epochs_finished(done - 2) if done > 1 else 0
        return any(epoch % every == 0 for epoch in range(before, self.epochs_finished(done - 1)))

    def steps_for_epochs(self, epochs: int) -> int:
        """Return the fewest steps that hold `epochs` epochs: ceil(epochs * epoch / total)."""
        return -(-epochs * self.epoch // self.total)


class InOrder(NamedTuple):
    """The order of samples that are looked at, and not trained on: as they stand."""

    seed: int = 0  # of their crops and phrasings
    buckets: None = None

    def index(self, position: int) -> int:
        """Return the data set row at `position`, which is the same."""
        return position


def share(count: int, batch_size: int, rank: int, processes: int) -> tuple[range, int]:
    """Return the samples that one of several processes takes, in whole batches (the last may get
    fewer), and how many rows each has, filled or not, as gathering wants equal sizes."""
    rows = math.ceil(math.ceil(count / batch_size) / processes) * batch_size
    first = min(count, rank * rows)
    return range(first, min(count, first + rows)), rows


def chosen_rows(count: int, wanted: int, seed: int) -> list[int]:
    """Return ``wanted`` of ``count`` rows, or all of them, in ascending order, by the seed."""
    generator = host_generator(seed, purpose="evaluation")
    return sorted(generator.permutation(count)[:wanted].tolist())
