"""The order of the samples: once per epoch, whatever the batches, ranks and interruptions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from diffusers_curriculum.randomness import Slots, host_generator
from diffusers_curriculum.training.data.plan import BatchPlan

SHAPES = [
    (n, batch, accumulation, world)
    for n in (1, 2, 7, 12, 31)
    for batch in (1, 2, 5)
    for accumulation in (1, 3)
    for world in (1, 2, 4)
]


def global_batch(step: int, n: int, batch: int, accumulation: int, world: int, seed: int = 3):
    """The rows of one optimizer step in slot order, gathered over micro-batches and ranks."""
    rows = []
    for micro in range(accumulation):
        for rank in range(world):
            plan = BatchPlan(n, batch, accumulation, world, rank, seed)
            rows += [plan.index(p) for p in plan.positions(step, micro)]
    return rows


@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_once_per_epoch(shape):
    n = shape[0]
    plan = BatchPlan(*shape, rank=0, seed=3)
    steps = plan.steps_for_epochs(3)
    rows = [row for step in range(steps) for row in global_batch(step, *shape)]
    for epoch in range(3):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.mark.parametrize("shape", [(7, 2, 3, 1), (12, 1, 2, 2), (31, 5, 1, 4), (2, 5, 1, 1)])
def test_resume_at_every_step_continues_at_the_next_sample(shape):
    n = shape[0]
    steps = BatchPlan(*shape, rank=0, seed=3).steps_for_epochs(4)
    whole = [global_batch(step, *shape) for step in range(steps)]
    for stop in range(steps + 1):
        first = [global_batch(step, *shape) for step in range(stop)]
        second = [global_batch(step, *shape) for step in range(stop, steps)]
        assert first + second == whole
        seen = Counter(row for batch in first + second for row in batch)
        assert all(seen[row] >= 4 for row in range(n))


def test_positions_are_one_unbroken_sequence():
    positions = []
    for step in range(5):
        for micro in range(3):
            for rank in range(2):
                positions += BatchPlan(10, 4, 3, 2, rank, 0).positions(step, micro)
    assert positions == list(range(5 * 24))


def test_one_two_and_four_ranks_see_the_same_global_batch():
    for step in range(20):
        one = global_batch(step, 31, 8, 1, 1)
        assert one == global_batch(step, 31, 4, 1, 2) == global_batch(step, 31, 2, 1, 4)
        assert one == global_batch(step, 31, 2, 2, 2) == global_batch(step, 31, 1, 8, 1)


def test_slots_follow_the_stated_layout():
    plan = BatchPlan(num_samples=100, batch_size=3, accumulation=4, world_size=2, rank=1, seed=0)
    assert plan.total == 24
    slots = plan.slots(2)
    assert (slots.start, slots.count, slots.total) == (2 * 6 + 3, 3, 24)
    assert plan.positions(5, 2) == range(5 * 24 + 15, 5 * 24 + 18)


def test_index_is_the_documented_permutation():
    plan = BatchPlan(11, 4, 1, 1, 0, seed=9)
    for epoch in (0, 1, 2, 1, 0):  # going back must not read a stale cache
        order = host_generator(9, epoch, purpose="data_order").permutation(11)
        found = [plan.index(epoch * 11 + place) for place in range(11)]
        assert found == order.tolist()


def test_epochs_and_seeds_have_different_orders():
    def order(seed: int, epoch: int) -> list[int]:
        plan = BatchPlan(50, 1, 1, 1, 0, seed)
        return [plan.index(epoch * 50 + i) for i in range(50)]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_epoch_arithmetic():
    plan = BatchPlan(num_samples=10, batch_size=4, accumulation=1, world_size=1, rank=0, seed=0)
    assert [plan.epochs_finished(step) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [plan.steps_for_epochs(epochs) for epochs in (1, 2, 3, 4)] == [3, 5, 8, 10]
    for epochs in range(1, 9):
        last = plan.steps_for_epochs(epochs) - 1
        assert plan.epochs_finished(last) >= epochs > plan.epochs_finished(last - 1)


def test_global_numpy_state_is_untouched():
    np.random.seed(5)
    expected = np.random.random_sample(3)
    np.random.seed(5)
    BatchPlan(1000, 4, 1, 1, 0, seed=123456).index(77)
    assert np.array_equal(expected, np.random.random_sample(3))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": -2}, "batch_size is -2"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"world_size": 0}, "world_size is 0"),
        ({"rank": 2}, "rank is 2"),
        ({"rank": -1}, "rank is -1"),
    ],
)
def test_wrong_plans_are_refused(changes, shown):
    good = {"num_samples": 5, "batch_size": 1, "accumulation": 1, "world_size": 2, "rank": 0}
    with pytest.raises(ValueError, match=shown):
        BatchPlan(**{**good, **changes}, seed=0)


@pytest.mark.parametrize(("step", "micro"), [(-1, 0), (0, 2), (0, -1)])
def test_steps_and_micro_batches_outside_the_plan_are_refused(step, micro):
    with pytest.raises(ValueError, match=r"step is|micro is"):
        BatchPlan(5, 1, 2, 1, 0, 0).positions(step, micro)


def beside(step: int, n: int, m: int, batch: int, accumulation: int, world: int) -> list[int]:
    """The rows of one optimizer step in slot order, with class images."""
    plans = [BatchPlan(n, batch, accumulation, world, rank, 3, m) for rank in range(world)]
    parts = ((plan, micro) for micro in range(accumulation) for plan in plans)
    return [plan.index(p) for plan, micro in parts for p in plan.positions(step, micro)]


def test_a_class_image_follows_each_sample():
    plan = BatchPlan(7, 4, 1, 1, 0, 3, num_class_images=3)
    steps = plan.steps_for_epochs(3)
    assert (steps, plan.epochs_finished(steps - 1)) == (6, 3)
    rows = [row for step in range(steps) for row in beside(step, 7, 3, 4, 1, 1)]
    samples, of_class = rows[::2], rows[1::2]
    assert samples == [BatchPlan(7, 4, 1, 1, 0, 3).index(p) for p in range(24)]
    assert all(sorted(of_class[i : i + 3]) == [7, 8, 9] for i in range(0, 24, 3))
    equal = [row for step in range(12) for row in beside(step, 5, 5, 5, 1, 1)]
    assert len({(a, b) for a, b in zip(equal[::2], equal[1::2], strict=True)}) > 5  # mixed anew


def test_class_images_are_the_same_on_any_number_of_ranks():
    for step in range(9):
        one = beside(step, 31, 10, 8, 1, 1)
        assert one == beside(step, 31, 10, 2, 1, 4) == beside(step, 31, 10, 2, 2, 2)
    plan = BatchPlan(31, 2, 2, 2, rank=1, seed=3, num_class_images=10)
    assert (plan.total, plan.slots(1)) == (16, Slots(12, 4, 16))
