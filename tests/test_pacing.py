"""When stages change: traces by hand, the exact law of patience on a plateau, schedules."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_curriculum.pacing import (
    PACINGS,
    PLATEAU_STAGE,
    FixedPacing,
    Pacing,
    PatiencePacing,
    make_pacing,
)

SCHEDULED = ("fixed", "linear", "cosine", "root")


def _stages(pacing: Pacing, losses: list[float], stages: int = 5) -> list[int]:
    """The stage after each loss."""
    state, found = pacing.initial_state(), []
    for step, loss in enumerate(losses):
        state = pacing.observe(state, torch.tensor(loss), stages)
        found.append(int(pacing.stage(state, step + 1, stages)))
    return found


def _changes(pacing: Pacing, losses: list[float], stages: int = 5) -> list[int]:
    """After how many losses the stage rose."""
    found = [1, *_stages(pacing, losses, stages)]
    return [n for n in range(1, len(found)) if found[n] > found[n - 1]]


# -- patience --------------------------------------------------------------------------------------

TRACE = [5.0, 4, 4, 4, 3, 3, 3, 3, 3]


def test_the_worked_trace_advances_at_the_eighth_loss() -> None:
    assert _stages(PatiencePacing(patience=3), TRACE) == [1, 1, 1, 1, 1, 1, 1, 2, 2]


def test_the_best_loss_is_forgotten_when_a_stage_opens() -> None:
    # the jump to 9 is the first, and so the best, loss of its stage
    losses = [1.0, 1, 1, 9, 8, 8, 8]
    assert _changes(PatiencePacing(patience=2), losses) == [3, 7]


def test_the_last_stage_lasts() -> None:
    assert _stages(PatiencePacing(patience=1), [1.0] * 10, stages=3)[-1] == 3
    assert _changes(PatiencePacing(patience=1), [1.0] * 10, stages=1) == []


@pytest.mark.parametrize(
    ("patience", "min_delta", "changes"),
    [(2, 0.0, []), (2, 0.15, []), (2, 0.25, [3, 6]), (3, 0.25, []), (3, 0.35, [4, 8])],
)
def test_an_improvement_must_exceed_min_delta(
    patience: int, min_delta: float, changes: list[int]
) -> None:
    losses = [10 - 0.1 * n for n in range(8)]
    assert _changes(PatiencePacing(patience=patience, min_delta=min_delta), losses) == changes


def _by_hand(losses: list[float], patience: int, min_delta: float) -> list[int]:
    best, counter, changes = math.inf, 0, []
    for n, loss in enumerate(losses, 1):
        if loss < best - min_delta:
            best, counter = loss, 0
        else:
            counter += 1
        if counter >= patience:
            best, counter = math.inf, 0
            changes.append(n)
    return changes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_delta", [0.0, 0.1])
def test_against_the_algorithm_as_published(seed: int, min_delta: float) -> None:
    losses = np.random.default_rng(seed).normal(size=120).tolist()
    pacing = PatiencePacing(patience=4, min_delta=min_delta)
    expected = _by_hand(losses, 4, min_delta)
    assert len(expected) > 5
    assert _changes(pacing, losses, stages=1000) == expected


def test_min_and_max_stage_steps() -> None:
    plateau = [1.0] * 12
    assert _changes(PatiencePacing(patience=2), plateau) == [3, 6, 9, 12]
    assert _changes(PatiencePacing(patience=2, min_stage_steps=5), plateau) == [5, 10]
    falling = [-float(n) for n in range(12)]
    assert _changes(PatiencePacing(patience=2), falling) == []
    assert _changes(PatiencePacing(patience=2, max_stage_steps=4), falling) == [4, 8, 12]
    assert _changes(PatiencePacing(patience=2, max_stage_steps=1), plateau, 4) == [1, 2, 3]


@pytest.mark.parametrize("smoothing", [0.5, 0.8, 0.9])
def test_smoothing_averages_and_starts_late(smoothing: float) -> None:
    losses = np.random.default_rng(1).normal(size=400).tolist()
    warm_up = round(1 / (1 - smoothing))
    average = best = math.inf
    steps = counter = 0
    expected = []
    for n, loss in enumerate(losses, 1):
        steps += 1
        average = loss if steps == 1 else smoothing * average + (1 - smoothing) * loss
        if steps <= warm_up:
            continue
        best, counter = (average, 0) if average < best else (best, counter + 1)
        if counter >= 5:
            best, steps, counter = math.inf, 0, 0
            expected.append(n)
    assert len(expected) > 5
    found = _changes(PatiencePacing(patience=5, smoothing=smoothing), losses, stages=1000)
    assert found == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_losses_that_are_not_finite_are_no_observation(bad: float, at: int) -> None:
    pacing = PatiencePacing(patience=3, smoothing=0.0)
    losses = [*TRACE[:at], bad, *TRACE[at:]]
    expected = _stages(pacing, TRACE)
    found = _stages(pacing, losses)
    assert [*found[:at], *found[at + 1 :]] == expected
    state = pacing.observe(pacing.initial_state(), torch.tensor(bad), 5)
    for name, value in pacing.initial_state().items():
        assert torch.equal(state[name], value)


def test_losses_are_compared_in_float64() -> None:
    losses = [1.0, 1 - 1e-12, 1 - 2e-12, 1 - 3e-12]
    state = PatiencePacing(patience=1).initial_state()
    for loss in losses:
        state = PatiencePacing(patience=1).observe(
            state, torch.tensor(loss, dtype=torch.float64), 5
        )
    assert int(state["stage"]) == 1


def test_the_state_does_not_change_in_place() -> None:
    pacing = PatiencePacing(patience=1)
    state = pacing.initial_state()
    copies = {name: value.clone() for name, value in state.items()}
    pacing.observe(state, torch.tensor(1.0), 5)
    assert all(torch.equal(state[name], copies[name]) for name in copies)


# -- tensors and numbers ---------------------------------------------------------------------------

ANY_LOSS = st.one_of(
    st.sampled_from([0.5, 0.25, 1.0, math.nan, math.inf, -math.inf, -0.0, 1e300, 5e-324]),
    st.floats(0, 2),
)


@st.composite
def _patience(draw: st.DrawFn) -> PatiencePacing:
    least = draw(st.integers(0, 4))
    return PatiencePacing(
        patience=draw(st.integers(1, 4)),
        min_delta=draw(st.sampled_from([0.0, 0.1, 1e-17])),
        smoothing=draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9])),
        min_stage_steps=least,
        max_stage_steps=draw(st.none() | st.integers(max(1, least), 8)),
    )


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.item() for name, value in state.items()}


def _exactly(numbers: dict[str, Any]) -> dict[str, tuple[type, str]]:
    return {k: (type(v), v.hex() if isinstance(v, float) else str(v)) for k, v in numbers.items()}


@given(_patience(), st.lists(ANY_LOSS, min_size=1, max_size=40), st.integers(1, 5))
def test_numbers_take_the_course_of_tensors(
    pacing: PatiencePacing, losses: list[float], stages: int
) -> None:
    tensors = pacing.initial_state()
    numbers = _numbers(tensors)
    for step, loss in enumerate(losses):
        before = dict(numbers)
        tensors = pacing.observe(tensors, torch.tensor(loss, dtype=torch.float64), stages)
        after = pacing.observe(numbers, loss, stages)
        assert numbers == before
        numbers = after
        assert _exactly(numbers) == _exactly(_numbers(tensors))
        assert pacing.stage(numbers, step + 1, stages) == int(
            pacing.stage(tensors, step + 1, stages)
        )


def test_numbers_follow_the_worked_trace() -> None:
    pacing, found = PatiencePacing(patience=3), []
    state = _numbers(pacing.initial_state())
    for loss in [*TRACE, math.nan, math.inf]:
        state = pacing.observe(state, loss, 5)
        found.append(state["stage"])
    assert found == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert state == {"stage": 2, "counter": 0, "stage_steps": 1, "best": 3.0, "average": 3.0}


def _plateau_lengths(patience: int, stages: int, seed: int = 0) -> np.ndarray:
    """Stage lengths on iid losses, many curricula at a time: the state is a batch of them."""
    runs, rng = 2000, np.random.default_rng(seed)
    pacing = PatiencePacing(patience=patience)
    state = {k: v.expand(runs).clone() for k, v in pacing.initial_state().items()}
    opened, lengths = np.zeros(runs, dtype=int), []
    step = 0
    while int(state["stage"].min()) < stages:
        before = state["stage"].numpy().copy()
        state = pacing.observe(state, torch.from_numpy(rng.random(runs)), stages)
        step += 1
        changed = state["stage"].numpy() > before
        lengths.append(step - opened[changed])
        opened[changed] = step
    return np.concatenate(lengths)


@pytest.mark.parametrize(
    ("patience", "mean", "sd", "median"), [(2, 4.4817, 1.524, 4), (10, 18.7083, 6.548, 17)]
)
def test_stage_length_on_a_plateau_has_its_exact_law(
    patience: int, mean: float, sd: float, median: float
) -> None:
    lengths = _plateau_lengths(patience, stages=11)
    n = len(lengths)
    assert n == 2000 * 10
    assert abs(lengths.mean() - mean) < 4 * sd / math.sqrt(n)
    assert lengths.std() == pytest.approx(sd, rel=0.04)
    assert float(np.median(lengths)) == median
    shortest, p = (lengths == patience + 1).mean(), 1 / (patience + 1)
    assert lengths.min() == patience + 1
    assert abs(shortest - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_plateau_quantiles_of_patience_ten() -> None:
    lengths = _plateau_lengths(10, stages=11, seed=1)
    for share, expected in [(0.1, 12), (0.5, 17), (0.9, 28), (0.99, 39)]:
        assert float(np.quantile(lengths, share)) == pytest.approx(expected, abs=1)


def _mean_by_recursion(patience: int) -> float:
    """Mean steps until ``patience`` steps without a record; step n is one with chance 1/n."""
    horizon = 60 * patience
    mean, alive = 0.0, np.zeros(patience)
    alive[0] = 1.0  # after step 1, always a record, counted 0 steps ago
    for n in range(2, horizon):
        mean += n * alive[-1] * (1 - 1 / n)
        alive = np.concatenate([[alive.sum() / n], alive[:-1] * (1 - 1 / n)])
    return mean


def test_expected_steps_on_a_plateau() -> None:
    assert _mean_by_recursion(2) == pytest.approx(4.4817, abs=1e-4)
    assert _mean_by_recursion(200) == pytest.approx(357.105, abs=1e-2)
    pacing = PatiencePacing(patience=200)
    assert pacing.expected_steps(20) == pytest.approx(19 * 357.105, rel=0.003)
    assert pytest.approx(1.7811, abs=5e-5) == PLATEAU_STAGE
    assert PatiencePacing(patience=200, max_stage_steps=100).expected_steps(20) == 1900
    assert PatiencePacing(patience=1, min_stage_steps=50).expected_steps(3) == 100
    assert PatiencePacing().expected_steps(1) == 0


# -- schedules -------------------------------------------------------------------------------------


def _scheduled(name: str) -> Pacing:
    return FixedPacing(stage_steps=100) if name == "fixed" else make_pacing(name, total_steps=400)


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules_are_monotone_from_the_first_to_the_last_stage(name: str) -> None:
    pacing = _scheduled(name)
    found = [int(pacing.stage({}, step, 5)) for step in range(1000)]
    assert found[0] == 1
    assert max(found) == 5
    assert all(b - a in (0, 1) for a, b in pairwise(found))
    assert set(found) == {1, 2, 3, 4, 5}
    assert found.index(5) == pacing.expected_steps(5)
    assert found[800] == 5


@pytest.mark.parametrize(
    ("name", "half", "at"),
    [
        ("linear", 3, [100, 200, 300, 400]),
        ("cosine", 3, [134, 200, 267, 400]),
        ("root", 3, [25, 100, 225, 400]),
    ],
)
def test_schedules_open_where_their_shape_says(name: str, half: int, at: list[int]) -> None:
    pacing = make_pacing(name, total_steps=400)
    found = [int(pacing.stage({}, step, 5)) for step in range(500)]
    assert found[200] == half
    assert [found.index(stage) for stage in (2, 3, 4, 5)] == at


@pytest.mark.parametrize("name", ["linear", "cosine", "root"])
@pytest.mark.parametrize(("progress", "stage"), [(0, 1), (1, 20), (2, 20)])
def test_progress_beyond_the_end_stays_at_the_end(name: str, progress: int, stage: int) -> None:
    pacing = make_pacing(name, total_steps=1900)
    assert pacing.stage({}, progress * 1900, 20) == stage
    assert pacing.stage({}, progress * 1900, 1) == 1


def test_linear_stages_start_exactly() -> None:
    """Rounding must not open a stage a step late."""
    for total, stages in [(100, 20), (1900, 20), (1000, 7), (49, 50), (6785, 20)]:
        pacing = make_pacing("linear", total_steps=total)
        for step in range(total + 1):
            assert pacing.stage({}, step, stages) == 1 + (stages - 1) * step // total


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules_keep_no_state(name: str) -> None:
    pacing = _scheduled(name)
    assert pacing.initial_state() == {}
    assert pacing.observe({}, torch.tensor(math.nan), 5) == {}


# -- building --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PACINGS))
def test_configs_round_trip(name: str) -> None:
    settings: dict[str, Any] = {
        "patience": {"patience": 7, "smoothing": 0.5, "max_stage_steps": 30},
        "fixed": {"stage_steps": 3},
    }
    pacing = make_pacing(name, **settings.get(name, {"total_steps": 12}))
    assert make_pacing(name, **asdict(pacing)) == pacing
    assert pacing != make_pacing(name)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("eager", {}, r"'eager' is unknown: choose from patience"),
        ("fixed", {"patience": 3}, r"'fixed' has no parameter 'patience': it takes stage_steps"),
        ("patience", {"name": "x"}, r"'patience' has no parameter 'name'"),
        ("patience", {"patience": 0}, r"patience=0 must be a whole number of at least 1"),
        ("patience", {"patience": -200}, r"patience=-200"),
        ("patience", {"patience": 2.5}, r"patience=2.5"),
        ("patience", {"patience": True}, r"patience=True"),
        ("patience", {"min_delta": -1e-9}, r"min_delta=-1e-09 must be 0 or more"),
        ("patience", {"min_delta": math.nan}, r"min_delta=nan"),
        ("patience", {"smoothing": 1.0}, r"smoothing=1.0 must lie in \[0, 1\)"),
        ("patience", {"smoothing": -0.1}, r"smoothing=-0.1"),
        ("patience", {"min_stage_steps": -1}, r"min_stage_steps=-1"),
        ("patience", {"max_stage_steps": 0}, r"max_stage_steps=0"),
        ("patience", {"min_stage_steps": 9, "max_stage_steps": 8}, r"max_stage_steps=8 must be"),
        ("fixed", {"stage_steps": 0}, r"stage_steps=0"),
        ("linear", {"total_steps": 0}, r"total_steps=0"),
        ("cosine", {"total_steps": 10.0}, r"total_steps=10.0"),
    ],
)
def test_wrong_names_and_numbers_are_refused(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_pacing(name, **parameters)


def test_the_base_class_decides_nothing() -> None:
    with pytest.raises(NotImplementedError):
        Pacing().stage({}, 0, 2)
    with pytest.raises(NotImplementedError):
        Pacing().expected_steps(2)
