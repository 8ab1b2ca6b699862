"""What adaptive samplers remember, against dictionaries and loops."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_curriculum.samplers.statistics import BinnedMeans, LastValues, finite_widths
from tests.floors_fixtures import SCHEDULERS, levels_of, table


def _binned(schedule: str = "sd", bins: int = 64, **kwargs: Any) -> BinnedMeans:
    settings: dict[str, Any] = {"binning": "quantile", "neighbours": 0, "ema": 0.9} | kwargs
    return BinnedMeans.of(levels_of(schedule), bins, **settings)


def _batches(levels: int, count: int, size: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, levels, (count, size))
    values = rng.lognormal(size=(count, size))
    return [(torch.tensor(i), torch.tensor(v)) for i, v in zip(indices, values, strict=True)]


# -- bins ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
@pytest.mark.parametrize("bins", [1, 7, 64, 1000])
def test_quantile_bins_hold_equal_numbers_of_neighbouring_levels(schedule: str, bins: int) -> None:
    statistics = _binned(schedule, bins)
    counts = torch.bincount(statistics.cell, minlength=bins)
    assert len(counts) == len(statistics.starts) == bins
    assert int(counts.max() - counts.min()) <= 1
    assert bool((statistics.cell.diff() >= 0).all())
    assert int(statistics.cell[-1]) == bins - 1  # also where its log-SNR is -inf
    assert statistics.starts == tuple((statistics.cell == b).nonzero()[0, 0] for b in range(bins))


@pytest.mark.parametrize("schedule", ["sd", "cosine", "sd_zero_terminal", "flow_shift_3", "edm"])
def test_equal_widths_leave_no_bin_without_a_level(schedule: str) -> None:
    lam = levels_of(schedule).log_snr.numpy()
    finite = lam[np.isfinite(lam)]
    edges = np.linspace(finite[0], finite[-1], 65)
    # a level belongs to the wide bin whose upper edge it has passed
    wide = [min(63, sum(x <= e for e in edges[1:-1])) for x in finite]
    found = _binned(schedule, binning="log_snr_width").cell.numpy()[np.isfinite(lam)]
    assert len(set(found)) == len(set(wide)) <= 64
    same = np.array(wide)[:, None] == np.array(wide)[None, :]
    assert np.mean(same != (found[:, None] == found[None, :])) < 1e-4  # levels on an edge


def test_equal_widths_merge_empty_bins_and_keep_the_terminal_level_in_the_last() -> None:
    assert len(_binned("cosine", binning="log_snr_width").starts) < 64
    cell = _binned("sd_zero_terminal", binning="log_snr_width").cell
    assert cell[-1] == cell[-2] == cell.max()


def test_unknown_binning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"binning='equal' is unknown: choose from quantile"):
        _binned(binning="equal")


# -- means over time -------------------------------------------------------------------------------


def _oracle_means(
    batches: list[tuple[Tensor, Tensor]], cell: Tensor, ema: float, window: int
) -> dict[int, float]:
    """Weighted means by plain bookkeeping: each observation weighs ema^(folds with news since)."""
    total, evidence = {}, {}
    for start in range(0, len(batches), window):
        found: dict[int, list[float]] = {}
        for indices, values in batches[start : start + window]:
            for index, value in zip(indices.tolist(), values.tolist(), strict=True):
                found.setdefault(int(cell[index]), []).append(value)
        for b, values in found.items():
            total[b] = ema * total.get(b, 0.0) + sum(values)
            evidence[b] = ema * evidence.get(b, 0.0) + len(values)
    return {b: total[b] / evidence[b] for b in total}


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("bins", "size"), [(5, 64), (200, 7), (64, 1)])
def test_means_are_those_of_plain_bookkeeping(ema: float, bins: int, size: int) -> None:
    statistics, batches = _binned(bins=bins, ema=ema), _batches(1000, 30, size)
    state = statistics.initial_state()
    for number, (indices, values) in enumerate(batches, 1):
        statistics.add(state, indices, values, torch.ones_like(values, dtype=torch.bool))
        if number % 10 == 0:
            statistics.fold(state)
    expected = _oracle_means(batches, statistics.cell, ema, 10)
    starts = torch.tensor(statistics.starts)
    for b, mean in expected.items():
        share = float(state["total"][b] / state["evidence"][b])
        assert share == pytest.approx(mean, rel=1e-12)
    count = torch.bincount(statistics.cell[torch.cat([i for i, _ in batches])], minlength=bins)
    assert torch.equal(statistics.seen(state), count)
    assert len(starts) == bins


def test_a_bin_without_news_keeps_its_mean() -> None:
    statistics = _binned(bins=4)
    state = statistics.initial_state()
    for values in ([1.0, 2.0, 3.0, 4.0], [5.0], [7.0]):
        given = torch.tensor(values, dtype=torch.float64)
        indices = torch.tensor([0, 300, 600, 900])[: len(values)]
        statistics.add(state, indices, given, torch.ones(len(values), dtype=torch.bool))
        statistics.fold(state)
    assert (state["total"] / state["evidence"])[1:].tolist() == [2.0, 3.0, 4.0]
    first = (0.81 * 1 + 0.9 * 5 + 7) / (0.81 + 0.9 + 1)
    assert float(state["total"][0] / state["evidence"][0]) == pytest.approx(first, rel=1e-14)


# -- from bins to levels ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
@pytest.mark.parametrize("binning", ["quantile", "log_snr_width"])
@pytest.mark.parametrize("neighbours", [0, 1, 3])
def test_profiles_interpolate_smoothed_means_between_bin_centres(
    schedule: str, binning: str, neighbours: int
) -> None:
    statistics = _binned(schedule, 20, binning=binning, neighbours=neighbours)
    count = len(statistics.starts)
    means = np.random.default_rng(1).lognormal(size=count)
    state = statistics.initial_state() | {
        "total": torch.tensor(means) * 3,
        "evidence": torch.full((count,), 3.0, dtype=torch.float64),
    }
    found = statistics.profile(state).numpy()
    smooth = []
    for b in range(count):
        near = [j for j in range(count) if abs(j - b) <= neighbours]
        weight = [neighbours + 1 - abs(j - b) for j in near]
        smooth.append(np.average(means[near], weights=weight))
    position = levels_of(schedule).positions.tolist()
    cell = statistics.cell.tolist()
    centre = [
        np.mean([x for x, c in zip(position, cell, strict=True) if c == b]) for b in range(count)
    ]
    for level in range(0, len(position), 37):
        x = position[level]
        if x >= centre[0]:
            expected = smooth[0]
        elif x <= centre[-1]:
            expected = smooth[-1]
        else:
            b = next(b for b in range(count) if centre[b + 1] <= x <= centre[b])
            part = (centre[b] - x) / (centre[b] - centre[b + 1])
            expected = (1 - part) * smooth[b] + part * smooth[b + 1]
        assert found[level] == pytest.approx(expected, rel=1e-9)


def test_infinite_levels_stand_one_step_beyond_their_neighbours() -> None:
    levels = table([torch.inf, 4.0, 2.0, 1.0, -torch.inf])
    assert levels.positions.tolist() == [6.0, 4.0, 2.0, 1.0, 0.0]
    # inner edges 5, 3, 1.5, 0.5: the two outer cells are infinite
    assert finite_widths(levels).tolist() == [2.0, 2.0, 1.5, 1.0, 1.0]
    plain = table([4.0, 2.0, 1.0])
    assert plain.positions.tolist() == [4.0, 2.0, 1.0]
    assert finite_widths(plain).tolist() == [2.0, 1.5, 1.0]


# -- the last few of each level --------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 10])
@pytest.mark.parametrize(("levels", "size"), [(5, 40), (5, 1), (50, 64), (3, 100)])
def test_histories_are_deques(length: int, levels: int, size: int) -> None:
    statistics = LastValues(tuple(range(levels)), length)
    state = statistics.initial_state()
    oracle = [deque(maxlen=length) for _ in range(levels)]
    rng = np.random.default_rng(2)
    for indices, values in _batches(levels, 25, size):
        valid = torch.tensor(rng.random(size) < 0.8)
        statistics.add(state, indices, values * valid, valid)
        statistics.fold(state)
        for i, v, ok in zip(indices.tolist(), values.tolist(), valid.tolist(), strict=True):
            if ok:
                oracle[i].append(v)
        expected = [sum(d) / max(1, len(d)) for d in oracle]
        torch.testing.assert_close(
            statistics.profile(state), torch.tensor(expected, dtype=torch.float64)
        )
        seen = statistics.seen(state).clamp_max(length)
        assert seen.tolist() == [len(d) for d in oracle]
    assert not bool(state["history"][-1].any())  # what is left out leaves nothing behind


def test_no_slot_of_a_history_is_written_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # which of two writes wins is anybody's guess on CUDA
    written: list[list[tuple[int, int]]] = []

    def write(history: Tensor, at: tuple[Tensor, Tensor], values: Tensor) -> None:
        slots = zip(at[0].tolist(), at[1].tolist(), strict=True)
        written.append([slot for slot in slots if slot[0] < 3])

    monkeypatch.setattr(torch.Tensor, "__setitem__", write)
    statistics = LastValues((0, 1, 2), 4)
    state = statistics.initial_state()
    for indices, values in _batches(3, 5, 50):
        statistics.add(state, indices, values, torch.ones(50, dtype=torch.bool))
    assert [len(slots) for slots in written] == [12] * 5
    assert [len(set(slots)) for slots in written] == [12] * 5
