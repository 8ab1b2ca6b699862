"""Losses per noise level against a loop over the samples, and how often the host waits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_curriculum.training.loop.tracking import LossByNoiseLevel, RunningMean

LEVELS = torch.linspace(6.0, -4.0, 101, dtype=torch.float64)


def micro_batch(seed: int, size: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, len(LEVELS), (size,), generator=generator)
    return indices, torch.rand(size, generator=generator)


def by_hand(log_snr: Tensor, losses: Tensor, edges: tuple[float, ...]) -> list[list[float]]:
    """The losses of every bin, one sample at a time."""
    found: list[list[float]] = [[] for _ in edges[1:]]
    for value, loss in zip(log_snr.tolist(), losses.tolist(), strict=True):
        last = max(i for i, low in enumerate(edges[:-1]) if i == 0 or value >= low)
        found[last].append(loss)
    return found


def test_means_and_counts_equal_a_loop_over_samples() -> None:
    tracker = LossByNoiseLevel(LEVELS, bins=5)
    batches = [micro_batch(seed) for seed in range(20)]
    for indices, losses in batches:
        tracker.add(indices, losses)
    indices, losses = (torch.cat(column) for column in zip(*batches, strict=True))
    expected = by_hand(LEVELS[indices], losses, tracker.edges)
    metrics = tracker.read()
    for name, values in zip(tracker.names, expected, strict=True):
        assert metrics[f"count_log_snr/{name}"] == len(values) > 0
        assert metrics[f"loss_log_snr/{name}"] == pytest.approx(sum(values) / len(values), 1e-12)


def test_names_show_the_edges_and_the_last_bin_is_closed() -> None:
    tracker = LossByNoiseLevel(LEVELS, bins=5)
    assert tracker.edges == (-4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
    assert tracker.names == ("[-4,-2)", "[-2,0)", "[0,2)", "[2,4)", "[4,6]")
    at = torch.tensor([6.0, -4.0, -2.0, -2.0 - 1e-9], dtype=torch.float64)
    tracker = LossByNoiseLevel(at, bins=5)
    tracker.add(torch.arange(4), torch.ones(4))
    metrics = tracker.read()
    assert [metrics[f"count_log_snr/{name}"] for name in tracker.names] == [2, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("bins", "low", "high"), [(10, -5.3561, 7.0661), (40, -0.3, 0.3), (7, 0, 9)]
)
def test_names_are_distinct(bins: int, low: float, high: float) -> None:
    names = LossByNoiseLevel(torch.linspace(high, low, 1000), bins=bins).names
    assert len(set(names)) == bins


def test_infinite_levels_count_to_the_end_bins() -> None:
    infinity = torch.tensor([math.inf])
    tracker = LossByNoiseLevel(torch.cat([infinity, LEVELS, -infinity]), bins=5)
    assert tracker.edges[0] == -4.0
    assert tracker.edges[-1] == 6.0
    tracker.add(torch.tensor([0, 102]), torch.tensor([0.25, 4.0]))
    metrics = tracker.read()
    assert metrics["loss_log_snr/[4,6]"] == 0.25
    assert metrics["loss_log_snr/[-4,-2)"] == 4.0


def test_reading_starts_a_new_window_and_the_summary_keeps_the_run() -> None:
    tracker = LossByNoiseLevel(LEVELS, bins=5)
    tracker.add(torch.tensor([0]), torch.tensor([1.0]))
    assert tracker.read()["loss_log_snr/[4,6]"] == 1.0
    assert "loss_log_snr/[4,6]" not in tracker.read()
    tracker.add(torch.tensor([0]), torch.tensor([2.0]))
    for _ in range(2):  # asking changes nothing
        summary = tracker.summary()
        assert summary.means[-1] == 1.5
        assert summary.counts == (0, 0, 0, 0, 2)
        assert math.isnan(summary.means[0])
    assert tracker.read()["loss_log_snr/[4,6]"] == 2.0
    assert tracker.summary().means[-1] == 1.5


def test_sums_do_not_drift() -> None:
    tracker = LossByNoiseLevel(LEVELS, bins=1)
    for _ in range(1000):
        tracker.add(torch.zeros(1000, dtype=torch.long), torch.full((1000,), 0.1))
    (loss,) = [v for k, v in tracker.read().items() if k.startswith("loss")]
    assert loss == pytest.approx(float(torch.tensor(0.1)), rel=1e-10)  # float32 sums miss by 1e-3


def test_gradients_and_half_precision_are_taken_as_they_come() -> None:
    tracker = LossByNoiseLevel(LEVELS, bins=1)
    losses = torch.tensor([0.5, 1.5], dtype=torch.bfloat16, requires_grad=True)
    tracker.add(torch.tensor([1, 2]), losses)
    assert all(not tensor.requires_grad for tensor in tracker.state_dict().values())
    assert next(iter(tracker.read().values())) == 1.0


class Syncs(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_adding_never_makes_the_host_wait() -> None:
    tracker, mean = LossByNoiseLevel(LEVELS), RunningMean()
    indices, losses = micro_batch(0)
    with Syncs() as syncs:
        for _ in range(3):
            tracker.add(indices, losses)
            mean.add(losses)
    assert syncs.names == []
    with Syncs() as syncs:
        losses.sum().item()
    assert syncs.names, "the counter itself must see an item()"


def sum_over(others: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A reduction in which the other processes hold the given tensors."""
    return lambda tensor: torch.stack([tensor, *others]).sum(0)


def test_processes_are_summed_once() -> None:
    first, second, alone = (LossByNoiseLevel(LEVELS, bins=5) for _ in range(3))
    for tracker, seed in ((first, 1), (second, 2), (alone, 1), (alone, 2)):
        tracker.add(*micro_batch(seed))
    reduce = sum_over([second.state_dict()["window"]])
    assert first.summary(reduce) == alone.summary()
    assert first.read(reduce) == pytest.approx(alone.read())
    assert first.summary().counts == alone.summary().counts


def test_a_resumed_run_of_two_processes_reads_the_same() -> None:
    first, second, alone = (LossByNoiseLevel(LEVELS, bins=5) for _ in range(3))
    alone.add(*micro_batch(0))
    first.add(*micro_batch(0))
    alone.read()
    first.read()
    for tracker, seed in ((first, 1), (second, 2), (alone, 1), (alone, 2)):
        tracker.add(*micro_batch(seed))
    state = first.state_dict(sum_over([second.state_dict()["window"]]))
    resumed = [LossByNoiseLevel(LEVELS, bins=5) for _ in range(2)]
    for rank, tracker in enumerate(resumed):
        tracker.load_state_dict(state, is_main_process=rank == 0)
    reduce = sum_over([resumed[1].state_dict()["window"]])
    assert resumed[0].read(reduce) == pytest.approx(alone.read())
    assert resumed[0].summary().counts == alone.summary().counts


def test_state_of_other_bins_is_refused() -> None:
    state = LossByNoiseLevel(LEVELS, bins=5).state_dict()
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 4\).*number of bins"):
        LossByNoiseLevel(LEVELS, bins=4).load_state_dict(state)


@pytest.mark.parametrize(("levels", "bins"), [(LEVELS, 0), (torch.tensor([math.inf]), 3)])
def test_bins_that_cannot_be_are_refused(levels: Tensor, bins: int) -> None:
    with pytest.raises(ValueError, match="give at least one bin"):
        LossByNoiseLevel(levels, bins=bins)


def test_running_mean_over_ragged_batches_windows_and_processes() -> None:
    mean = RunningMean()
    mean.add(torch.tensor([1.0, 2.0, 3.0]))
    mean.add(torch.tensor(6.0))
    assert mean.read() == 3.0
    assert math.isnan(mean.read())
    mean.add(torch.tensor([4.0]))
    assert mean.read(sum_over([torch.tensor([6.0, 4.0])])) == 2.0


def test_running_mean_continues_from_its_state() -> None:
    mean, resumed = RunningMean(), RunningMean()
    mean.add(torch.tensor([1.0, 2.0]))
    resumed.load_state_dict(mean.state_dict())
    resumed.add(torch.tensor([6.0]))
    assert resumed.read() == 3.0
    resumed.load_state_dict(mean.state_dict(), is_main_process=False)
    assert math.isnan(resumed.read())
