"""Which sample is seen when, as pure arithmetic: there is no loader state to save or to lose.

Optimizer step s consumes the positions s * total ... (s + 1) * total - 1 of one endless sequence;
position p stands for the (p mod n)-th entry of the permutation of epoch p // n. Batches run across
epoch edges, so all are full. Resuming is starting at another step, and one process or eight see
the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from diffusers_curriculum.randomness import Slots, host_generator


@lru_cache(maxsize=2)  # a batch touches at most two neighbouring epochs in the usual case
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    order = host_generator(seed, epoch, purpose="data_order").permutation(num_samples)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class BatchPlan:
    """The order of the samples for one rank, a pure function of its six integers.

    Raises:
        ValueError: a count below 1, or a rank outside [0, world_size).
    """

    num_samples: int  # n
    batch_size: int  # samples per rank and micro-batch
    accumulation: int  # micro-batches per optimizer step
    world_size: int
    rank: int
    seed: int

    def __post_init__(self) -> None:
        for field in fields(self)[:4]:
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; it must lie in [0, {self.world_size}).")

    @property
    def total(self) -> int:
        """Return the number of samples of one optimizer step, over all ranks and micro-batches."""
        return self.batch_size * self.accumulation * self.world_size

    def slots(self, micro: int) -> Slots:
        """Return which slots of the global batch this rank's micro-batch `micro` holds.

        slot(micro a, rank r, i) = a * batch_size * world_size + r * batch_size + i; ValueError for
        a `micro` outside [0, accumulation).
        """
        if not 0 <= micro < self.accumulation:
            raise ValueError(f"micro is {micro}; it must lie in [0, {self.accumulation}).")
        return Slots.of(
            self.batch_size,
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
        """Return the data set row at `position`: permutation(seed, p // n)[p mod n]."""
        epoch, place = divmod(position, self.num_samples)
        return int(_permutation(self.seed, epoch, self.num_samples)[place])

    def epochs_finished(self, step: int) -> int:
        """Return how many epochs are complete once `step` has been done."""
        return (step + 1) * self.total // self.num_samples

    def epoch_is_due(self, done: int, every: int) -> bool:
        """Return whether the last of ``done`` steps ended an epoch whose number is a multiple of
        ``every``."""
        before = self.epochs_finished(done - 2) if done > 1 else 0
        return any(epoch % every == 0 for epoch in range(before, self.epochs_finished(done - 1)))

    def steps_for_epochs(self, epochs: int) -> int:
        """Return the fewest steps that hold `epochs` epochs: ceil(epochs * n / total)."""
        return -(-epochs * self.num_samples // self.total)
