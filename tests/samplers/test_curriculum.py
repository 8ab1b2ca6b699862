"""The curriculum: what is open when, what is learned from losses, and that the end is the base."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import stages
from diffusers_curriculum.samplers.stages import ORDERS, WITHIN, Stages, restrict
from tests.floors_fixtures import SCHEDULERS
from tests.samplers.draws import parts

FIXED = {"pacing": "fixed", "pacing_args": {"stage_steps": 10}}
STARTS = [0, 149, 372, 605, 816]  # sd, 5 clusters of log-SNR


class Moving(TimestepSampler):
    """A law that changes with the step: mass 1/2 on level step % T, the rest uniform."""

    static_law = False

    def __init__(self, scheduler: Any, floor: float = 0.0) -> None:
        super().__init__(NoiseLevels.from_scheduler(scheduler), floor=floor)
        self.observed: list[int] = []
        self.register_to_config(floor=floor)

    def law(self, step: int, device: torch.device) -> Tensor:
        law = torch.full((len(self.levels),), 0.5 / len(self.levels), dtype=torch.float64)
        law[step % len(law)] += 0.5
        return law.to(device)

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        self.observed.append(step)


def _base(schedule: str = "sd", **kwargs: Any) -> DensityTimestepSampler:
    return DensityTimestepSampler(SCHEDULERS[schedule](), **kwargs)


def _curriculum(base: TimestepSampler | None = None, **kwargs: Any) -> CurriculumTimestepSampler:
    base = base or _base()
    method = "log_snr" if base.levels.family == "vp" else "quantile"
    settings: dict[str, Any] = {"clusters": 5, "clustering": method} | kwargs
    return CurriculumTimestepSampler(base, **settings)


def _feed(sampler: CurriculumTimestepSampler, losses: list[float], start: int = 0) -> None:
    for step, loss in enumerate(losses, start):
        sampler.observe(torch.tensor([0, 999]), torch.tensor([loss, loss]), step)


def _clusters(values: Tensor) -> list[Tensor]:
    return list(values.tensor_split(STARTS[1:]))


# -- what is open ----------------------------------------------------------------------------------

OPENED = {
    "easy_to_hard": [[4], [3, 4], [2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]],
    "hard_to_easy": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]],
}


@pytest.mark.parametrize("order", OPENED)
@pytest.mark.parametrize("density", ["uniform", "laplace"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_stages_accumulate_and_closed_clusters_have_no_mass(
    order: str, density: str, floor: float
) -> None:
    base = _base(density=density, density_args={"b": 1.0} if density == "laplace" else {})
    base.floor = floor
    sampler = _curriculum(base, order=order, **FIXED)
    assert list(sampler.starts) == STARTS
    for stage, opened in enumerate(OPENED[order], 1):
        mass = sampler.probabilities(10 * (stage - 1))
        assert sampler.stage(10 * stage - 1) == stage
        for cluster, part in enumerate(_clusters(mass)):
            assert bool((part > 0).all()) if cluster in opened else bool((part == 0).all())
        assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
        keep = mass > 0
        law = base.law(0, torch.device("cpu"))
        share = keep.double() / keep.sum()
        expected = (1 - floor) * law * keep / law[keep].sum() + floor * share
        torch.testing.assert_close(mass, expected, atol=1e-16, rtol=1e-12)
        drawn = sampler.sample(2000, step=10 * (stage - 1)).indices
        assert bool(keep[drawn].all())


@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
@pytest.mark.parametrize("correction", ["none", "full", 0.5])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_last_stage_is_the_base_bit_for_bit(
    schedule: str, correction: str | float, floor: float
) -> None:
    base = _base(schedule, floor=floor, importance_correction=correction, seed=5)
    sampler = _curriculum(base, **FIXED)
    for step in (40, 41, 1000):
        assert torch.equal(sampler.probabilities(step), base.probabilities(step))
        assert torch.equal(sampler.importance(step), base.importance(step))
        both = (parts(s.sample(500, step=step)) for s in (sampler, base))
        for ours, theirs in zip(*both, strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(sampler.probabilities(39), base.probabilities(39))


@pytest.mark.parametrize("floor", [0.1, 0.5])
def test_importance_corrects_to_the_restricted_reference(floor: float) -> None:
    sampler = _curriculum(_base(floor=floor, importance_correction="full"), **FIXED)
    for step in (0, 15, 25, 35, 45):
        mass, importance = sampler.probabilities(step), sampler.importance(step)
        assert float((mass * importance).sum()) == pytest.approx(1, abs=1e-12)
        opened = mass > 0
        assert float(importance[opened].max()) <= 1 / floor + 1e-9
        corrected = (mass * importance)[opened]
        expected = torch.full_like(corrected, 1 / int(opened.sum()))
        torch.testing.assert_close(corrected, expected, atol=0, rtol=1e-12)
        sample = sampler.sample(50, step=step)
        assert torch.equal(sample.importance, importance.float()[sample.indices])


@pytest.mark.parametrize("name", ["linear", "cosine", "root"])
def test_mass_of_the_easy_part_falls_as_the_curriculum_proceeds(name: str) -> None:
    sampler = _curriculum(clusters=20, pacing=name, pacing_args={"total_steps": 100})
    easy = [float(sampler.probabilities(step)[sampler.starts[-1] :].sum()) for step in range(130)]
    assert easy[0] == pytest.approx(1, abs=1e-12)
    assert all(b <= a for a, b in pairwise(easy))
    assert easy[100] == easy[129] == float(sampler.base.probabilities()[sampler.starts[-1] :].sum())
    assert len(set(easy)) == 20


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_permutations(order: str) -> None:
    assert sorted(Stages.of(range(7), 7, order, "base", seed=0).order) == list(range(7))
    stages = Stages.of((0, 2, 3), 6, order, "base", seed=0)
    assert stages.cluster_of.tolist() == [0, 0, 1, 2, 2, 2]
    assert stages.opened.sum(1).tolist() == sorted(stages.opened.sum(1).tolist())
    assert stages.opened[-1].tolist() == [1] * 6
    assert stages.opened[0].tolist() == [float(c == stages.order[0]) for c in (0, 0, 1, 2, 2, 2)]


def test_a_random_order_depends_on_the_seed_only() -> None:
    first, again = (_curriculum(_base(seed=1), order="random", clusters=20) for _ in range(2))
    other = _curriculum(_base(seed=2), order="random", clusters=20)
    assert first.open_order == again.open_order != other.open_order
    mass = first.probabilities(0)
    assert int((mass > 0).sum()) == int(first.open_levels(1).sum()) < 1000


def test_balanced_stages_give_each_open_cluster_the_same_mass() -> None:
    sampler = _curriculum(_base(density="laplace", floor=0.0), within="balanced", **FIXED)
    for stage in range(1, 6):
        shares = [float(part.sum()) for part in _clusters(sampler.probabilities(10 * (stage - 1)))]
        expected = [0.0] * (5 - stage) + [1 / stage] * stage
        assert shares == pytest.approx(expected, abs=1e-12)
    assert float(sampler.probabilities(40).sum()) == pytest.approx(1, abs=1e-12)
    # inside a cluster the base's proportions hold
    base, ours = _clusters(sampler.base.probabilities())[2], _clusters(sampler.probabilities(50))[2]
    torch.testing.assert_close(ours / ours.sum(), base / base.sum(), atol=0, rtol=1e-12)


@pytest.mark.parametrize("stage", [1, 3, 5])
def test_balanced_stages_with_a_floor_and_correction(stage: int) -> None:
    base = _base(density="laplace", floor=0.2, importance_correction="full")
    sampler = _curriculum(base, within="balanced", **FIXED)
    mass, importance = (f(10 * (stage - 1)) for f in (sampler.probabilities, sampler.importance))
    opened = sampler.open_levels(stage)
    shares = [float(part.sum()) for part in _clusters(mass)]
    sizes = [float(part.sum() / opened.sum()) for part in _clusters(opened.double())]
    expected = [0.8 / stage * (size > 0) + 0.2 * size for size in sizes]
    assert shares == pytest.approx(expected, abs=1e-12)
    assert float((mass * importance).sum()) == pytest.approx(1, abs=1e-12)
    assert float(importance[opened].max()) <= 5 + 1e-9


def test_restriction_of_a_law() -> None:
    law = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    kept = restrict(law, torch.tensor([0.0, 1, 1, 0], dtype=torch.float64))
    torch.testing.assert_close(kept, torch.tensor([0, 0.4, 0.6, 0], dtype=torch.float64))
    assert torch.equal(restrict(law, torch.ones(4, dtype=torch.float64)), law)


def test_open_ranges() -> None:
    sampler = _curriculum(**FIXED)
    lam = sampler.levels.log_snr
    assert sampler.open_range(1) == (float(lam[-1]), float(lam[816]))
    assert sampler.open_range(5) == (float(lam[-1]), float(lam[0]))
    assert sampler.open_levels(2).nonzero().flatten().tolist() == list(range(605, 1000))


def test_explicit_boundaries() -> None:
    boundaries = {"boundaries": [2.0, 0.0, -2.0]}
    sampler = _curriculum(clusters=4, clustering="explicit", clustering_args=boundaries)
    assert sampler.stages == 4
    lam = sampler.levels.log_snr
    assert [float(lam[s]) <= b for s, b in zip(sampler.starts[1:], (2, 0, -2), strict=True)] == (
        [True] * 3
    )
    assert [float(lam[s - 1]) > b for s, b in zip(sampler.starts[1:], (2, 0, -2), strict=True)] == (
        [True] * 3
    )


# -- learning --------------------------------------------------------------------------------------


def test_patience_opens_clusters_and_stages_are_recorded() -> None:
    sampler = _curriculum(pacing_args={"patience": 3})
    assert sampler.opened_at.tolist() == [0, -1, -1, -1, -1]
    _feed(sampler, [5.0, 4, 4, 4, 3, 3, 3])
    assert sampler.stage() == 1
    assert int(sampler.metrics()["patience_counter"]) == 2
    assert float(sampler.metrics()["best_loss"]) == 3.0
    _feed(sampler, [3.0], start=7)
    assert sampler.stage() == 2
    assert sampler.opened_at.tolist() == [0, 8, -1, -1, -1]
    assert float(sampler.metrics()["best_loss"]) == math.inf
    assert float(sampler.probabilities()[:605].sum()) == 0
    _feed(sampler, [1.0] * 40, start=8)
    assert sampler.stage() == 5
    assert sampler.opened_at.tolist() == [0, 8, 12, 16, 20]
    assert torch.equal(sampler.probabilities(), sampler.base.probabilities())


@pytest.mark.parametrize("name", ["fixed", "linear"])
def test_scheduled_stages_are_recorded(name: str) -> None:
    args = {"fixed": {"stage_steps": 3}, "linear": {"total_steps": 2}}[name]
    sampler = _curriculum(pacing=name, pacing_args=args)
    _feed(sampler, [1.0] * 15)
    expected = {"fixed": [0, 3, 6, 9, 12], "linear": [0, 1, 1, 2, 2]}[name]
    assert sampler.opened_at.tolist() == expected
    for stage, step in enumerate(expected, 1):
        assert sampler.stage(step) >= stage > sampler.stage(step - 1) or step == 0


def test_the_loss_tested_is_the_mean_of_the_global_batch() -> None:
    sampler = _curriculum(pacing_args={"patience": 1})
    sampler.observe(torch.tensor([900, 950, 999]), torch.tensor([1.0, 2.0, 6.0]), 0)
    assert float(sampler.metrics()["best_loss"]) == 3.0
    sampler.observe(torch.tensor([900, 950]), torch.tensor([2.0, 3.9]), 1)  # 2.95: better
    assert sampler.stage() == 1
    sampler.observe(torch.tensor([900]), torch.tensor([2.96]), 2)
    assert sampler.stage() == 2


def test_samples_are_counted_by_cluster() -> None:
    sampler = _curriculum(**FIXED)
    sampler.observe(torch.tensor([0, 148, 149, 604, 999]), torch.ones(5), 0)
    sampler.observe(torch.tensor([816, 999]), torch.ones(2), 1)
    assert sampler.cluster_counts.tolist() == [2, 1, 1, 0, 3]
    assert sampler.cluster_counts.dtype == torch.int64


def test_steps_with_a_loss_that_is_not_finite_do_not_count() -> None:
    sampler = _curriculum(pacing_args={"patience": 3})
    _feed(sampler, [5.0, math.nan, 4, 4, math.inf, 4, 3, math.nan, 3, 3])
    assert sampler.stage() == 1
    _feed(sampler, [3.0], start=10)
    assert sampler.stage() == 2
    assert sampler.opened_at.tolist()[:2] == [0, 11]


def test_observing_reads_nothing_back_and_returns_nothing() -> None:
    sampler = _curriculum()
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    assert sampler.observe(torch.tensor([1, 2]), losses.detach(), 0) is None
    assert all(not v.requires_grad for v in sampler.state_dict().values() if torch.is_tensor(v))


# -- on a device -----------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes curricula treat the CPU as a device that must not be waited for, or not."""
    monkeypatch.setattr(stages, "reads_freely", lambda device: not switched[-1])
    switched = [False]
    return switched.append


DEVICE_SETTINGS: list[dict[str, Any]] = [
    {"pacing_args": {"patience": 2}},
    {"pacing_args": {"patience": 2, "smoothing": 0.6, "max_stage_steps": 6}, "order": "random"},
    {"pacing_args": {"patience": 3, "min_delta": 0.01, "min_stage_steps": 4}, "within": "balanced"},
    {"pacing": "linear", "pacing_args": {"total_steps": 30}},
]


def _bits(state: dict[str, Any]) -> dict[str, Any]:
    whole = {name: torch.as_tensor(value) for name, value in state.items()}
    return {name: (v.dtype, v.shape, v.numpy().tobytes()) for name, v in whole.items()}


@pytest.mark.parametrize("settings", DEVICE_SETTINGS, ids=range(len(DEVICE_SETTINGS)))
@pytest.mark.parametrize("moving", [False, True])
def test_a_device_takes_the_course_of_the_host(
    settings: dict[str, Any], moving: bool, as_on_a_device: Callable[[bool], None]
) -> None:
    def build(on_device: bool) -> CurriculumTimestepSampler:
        as_on_a_device(on_device)
        base = Moving(SCHEDULERS["sd"](), floor=0.1) if moving else _base(seed=4)
        return _curriculum(base, **settings)

    def steps(sampler: CurriculumTimestepSampler, on_device: bool) -> list[Any]:
        as_on_a_device(on_device)
        generator, found = torch.Generator().manual_seed(1), []
        for step in range(40):
            sample = sampler.sample(16)
            losses = torch.rand(16, generator=generator)
            losses[0] = {5: math.nan, 6: math.inf}.get(step, 0.5)
            sampler.observe(sample.indices, losses, step)
            found.append((sample, _bits(sampler.state_dict()), sampler.probabilities()))
            if step == 20:
                sampler.load_state_dict(sampler.state_dict())
        return found

    host, device = (build(on_device) for on_device in (False, True))
    for ours, theirs in zip(steps(device, True), steps(host, False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parts(ours[0]), parts(theirs[0]), strict=True))
        assert ours[1] == theirs[1]
        assert torch.equal(ours[2], theirs[2])
    assert host.stage() > 3
    tensors, numbers = device._progress.pace, host._progress.pace
    assert all(isinstance(value, Tensor) for value in tensors.values())
    assert not any(isinstance(value, Tensor) for value in numbers.values())


def test_the_state_follows_the_losses_to_a_device() -> None:
    sampler = _curriculum(pacing_args={"patience": 1})
    _feed(sampler, [3.0, 4.0])
    device = torch.device("meta")
    sampler.sample(4, device=device)
    assert sampler.stage() == 2  # still known to the host
    losses = torch.ones(3, device=device)
    sampler.observe(torch.zeros(3, dtype=torch.int64, device=device), losses, 2)
    state = sampler._progress
    kept = [*state.pace.values(), state.cluster_counts, state.opened_at]
    assert {value.device for value in kept} == {device}
    assert [v.dtype for v in state.pace.values()] == [torch.int64] * 3 + [torch.float64] * 2
    assert sampler.sample(4, device=device).indices.device == device


# -- states on disk --------------------------------------------------------------------------------

# as written by version 0.1.0
WRITTEN: dict[str, Any] = {
    "calls": 7,
    "state.stage": torch.tensor(2),
    "state.counter": torch.tensor(1),
    "state.stage_steps": torch.tensor(2),
    "state.best": torch.tensor(0.25, dtype=torch.float64),
    "state.average": torch.tensor(0.5, dtype=torch.float64),
    "state.cluster_counts": torch.tensor([0, 0, 0, 4, 10]),
    "state.opened_at": torch.tensor([0, 5, -1, -1, -1]),
    "base.calls": 0,
    "starts": torch.tensor(STARTS),
}


def test_states_are_written_under_the_same_names_and_types() -> None:
    state = _curriculum(pacing_args={"patience": 3}).state_dict()
    assert list(state) == list(WRITTEN)
    for name, value in WRITTEN.items():
        assert type(state[name]) is type(value)
        if isinstance(value, Tensor):
            assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape)


def test_a_written_state_is_taken_over() -> None:
    sampler = _curriculum(pacing_args={"patience": 3})
    sampler.load_state_dict(WRITTEN)
    assert _bits(sampler.state_dict()) == _bits(WRITTEN)
    assert (sampler.stage(), int(sampler.metrics()["patience_counter"])) == (2, 1)
    assert sampler.metrics()["best_loss"].dtype == torch.float64
    _feed(sampler, [0.25], 7)
    assert sampler.stage() == 2
    _feed(sampler, [0.25], 8)
    assert sampler.stage() == 3
    assert sampler.opened_at.tolist() == [0, 5, 9, -1, -1]
    assert WRITTEN["state.opened_at"].tolist() == [0, 5, -1, -1, -1]


def test_stages_are_recorded_anew_after_a_state_of_an_earlier_step() -> None:
    sampler = _curriculum(**FIXED)
    early = sampler.state_dict()
    _feed(sampler, [1.0] * 25)
    assert sampler.opened_at.tolist() == [0, 10, 20, -1, -1]
    sampler.load_state_dict(early)
    _feed(sampler, [1.0] * 12)
    assert sampler.opened_at.tolist() == [0, 10, -1, -1, -1]


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("moving", [False, True])
def test_after_the_last_stage_of_patience_the_sampler_is_its_base_bit_for_bit(
    moving: bool, on_device: bool, as_on_a_device: Callable[[bool], None]
) -> None:
    as_on_a_device(on_device)
    base = (
        Moving(SCHEDULERS["sd"](), floor=0.1)
        if moving
        else _base(floor=0.05, importance_correction="full")
    )
    sampler = _curriculum(base, pacing_args={"patience": 1})
    _feed(sampler, [1.0] * 7)
    assert sampler.stage() == 4
    assert not torch.equal(sampler.probabilities(9), base.probabilities(9))
    _feed(sampler, [1.0] * 1, 7)
    assert sampler.stage() == 5
    for step in (9, 10, 500):
        assert torch.equal(sampler.probabilities(step), base.probabilities(step))
        assert torch.equal(sampler.importance(step), base.importance(step))
        pairs = zip(*(parts(s.sample(64, step=step)) for s in (sampler, base)), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("within", WITHIN)
def test_what_is_drawn_is_what_is_told_at_every_stage(within: str, moving: bool) -> None:
    base = (
        Moving(SCHEDULERS["sd"](), floor=0.2)
        if moving
        else _base(importance_correction="full", floor=0.2)
    )
    sampler = _curriculum(base, within=within, **FIXED)
    for step in (0, 10, 25, 30, 45, 0):
        cdf, importance = sampler._tables(step, torch.device("cpu"))
        mass = sampler.probabilities(step)
        sums = mass.cumsum(0)
        assert torch.equal(cdf, sums / sums[-1])
        assert torch.equal(importance, sampler.importance(step).float())
        before = mass.clone()
        mass.zero_()
        assert torch.equal(sampler.probabilities(step), before)


# -- bases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_a_base_whose_law_changes_with_the_step(floor: float) -> None:
    base = Moving(SCHEDULERS["sd"](), floor=floor)
    sampler = _curriculum(base, **FIXED)
    for step in (0, 3, 12, 45, 45):
        law = base.law(step, torch.device("cpu"))
        opened = sampler.open_levels(sampler.stage(step))
        share = opened.double() / opened.sum()
        expected = (1 - floor) * law * opened / law[opened].sum() + floor * share
        torch.testing.assert_close(sampler.probabilities(step), expected, atol=1e-16, rtol=1e-12)
        drawn = (
            torch.bincount(sampler.sample(4000, step=step).indices, minlength=1000).double() / 4000
        )
        at = step % 1000
        error = 4 * math.sqrt(float(expected[at]) / 4000) + 1e-9
        assert abs(float(drawn[at] - expected[at])) < error
    assert float(sampler.probabilities(45)[45]) > 0.3  # the last stage follows the moving law
    _feed(sampler, [1.0, 1.0])
    assert base.observed == [0, 1]


def test_a_curriculum_of_a_curriculum() -> None:
    inner = _curriculum(_base(density="uniform"), **FIXED)
    outer = _curriculum(
        inner, clustering="uniform", clusters=2, pacing="fixed", pacing_args={"stage_steps": 25}
    )
    for step, first in [(0, 816), (12, 605), (24, 500), (25, 372), (35, 149), (45, 0)]:
        mass = outer.probabilities(step)
        opened = torch.zeros(1000, dtype=torch.bool)
        opened[first:] = True
        assert torch.equal(mass > 0, opened)
        assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
        assert int(outer.sample(100, step=step).indices.min()) >= first
    assert torch.equal(outer.probabilities(50), inner.base.probabilities())
    _feed(outer, [1.0] * 3)
    assert inner.cluster_counts.tolist() == [3, 0, 0, 0, 3]


def test_patience_of_a_curriculum_of_a_curriculum_survives_a_state(tmp_path: Path) -> None:
    def build() -> CurriculumTimestepSampler:
        return _curriculum(_curriculum(pacing_args={"patience": 2}), pacing_args={"patience": 3})

    first, second = build(), build()
    _feed(first, [1.0] * 7)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.probabilities(), first.probabilities())
    inner = second.base
    assert isinstance(inner, CurriculumTimestepSampler)
    assert (inner.stage(), second.stage()) == (3, 2)
    first.save_pretrained(str(tmp_path))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    loaded.load_state_dict(first.state_dict())
    assert torch.equal(loaded.probabilities(), first.probabilities())


# -- drawing, config, state ------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
def test_timesteps_keep_the_schedulers_dtype(schedule: str) -> None:
    sampler = _curriculum(_base(schedule))
    sample = sampler.sample(64)
    assert sample.timesteps.dtype == sampler.levels.timesteps.dtype
    assert torch.equal(sample.timesteps, sampler.levels.timesteps[sample.indices])
    assert int(sample.indices.min()) >= sampler.starts[-1]


def test_ends_of_the_unit_interval_stay_open() -> None:
    u = torch.tensor([0.0, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    for order, first, last in [("easy_to_hard", 816, 999), ("hard_to_easy", 0, 148)]:
        assert _curriculum(order=order).sample(u=u).indices.tolist() == [first, last, last]


def test_draws_from_a_generator() -> None:
    sampler = _curriculum()
    first, again = (
        sampler.sample(8, generator=torch.Generator().manual_seed(3)).indices for _ in range(2)
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize("arguments", [{}, {"batch": 2, "u": torch.zeros(2)}], ids=["none", "both"])
def test_sample_takes_a_batch_or_numbers(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        _curriculum().sample(**arguments)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"clusters": 7, "order": "random", "within": "balanced"},
    {"pacing": "root", "pacing_args": {"total_steps": 9}, "order": "hard_to_easy"},
    {"clustering": "snr", "clustering_args": {"center": "ant", "min_size": 3}},
    {"clustering": "explicit", "clustering_args": {"boundaries": [0, 10, 500]}, "clusters": 3},
    {"clustering": "explicit", "clustering_args": {"boundaries": [1.5, 0.0]}, "clusters": 3},
    {"pacing_args": {"patience": 4, "smoothing": 0.5, "max_stage_steps": 20}},
]


@pytest.mark.parametrize("schedule", ["sd", "sd_zero_terminal", "flow_shift_3", "edm"])
@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_configs_round_trip_to_equal_draws(
    settings: dict[str, Any], schedule: str, tmp_path: Path
) -> None:
    base = _base(schedule, density="cauchy", importance_correction="full", seed=3, draw="sobol")
    sampler = _curriculum(base, **settings)
    sampler.save_pretrained(str(tmp_path))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    assert isinstance(loaded, CurriculumTimestepSampler)
    assert isinstance(loaded.base, DensityTimestepSampler)
    assert loaded.starts == sampler.starts
    assert loaded.open_order == sampler.open_order
    assert loaded.pacing == sampler.pacing
    for step in range(12):
        for ours, theirs in zip(parts(sampler.sample(20)), parts(loaded.sample(20)), strict=True):
            assert torch.equal(ours, theirs)
        _feed(sampler, [1.0], step)
        _feed(loaded, [1.0], step)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("after", [0, 1, 5, 23])
def test_a_loaded_state_gives_the_same_next_thousand_draws(after: int, smoothing: float) -> None:
    def build() -> CurriculumTimestepSampler:
        return _curriculum(pacing_args={"patience": 4, "smoothing": smoothing}, clusters=20)

    losses = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    first, second = build(), build()
    for step in range(after):
        first.sample(10)
        _feed(first, [losses[step]], step)
    second.load_state_dict(first.state_dict())
    for step in range(after, after + 100):
        assert torch.equal(first.sample(10).indices, second.sample(10).indices)
        _feed(first, [losses[step]], step)
        _feed(second, [losses[step]], step)
    assert first.stage() > 3
    for name, value in first.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.state_dict()[name]))


def test_a_state_is_not_changed_by_later_steps() -> None:
    sampler = _curriculum(pacing_args={"patience": 1})
    _feed(sampler, [1.0, 2.0])
    state = sampler.state_dict()
    copies = {k: torch.as_tensor(v).clone() for k, v in state.items()}
    _feed(sampler, [1.0] * 5, 2)
    assert all(torch.equal(torch.as_tensor(state[k]), copies[k]) for k in state)


def test_states_hold_plain_numbers_and_tensors_only() -> None:
    for value in _curriculum().state_dict().values():
        assert isinstance(value, int | float | Tensor)


def test_wrong_states_are_refused_and_change_nothing() -> None:
    sampler = _curriculum(pacing_args={"patience": 2})
    _feed(sampler, [1.0, 1.0])
    before = {k: torch.as_tensor(v).clone() for k, v in sampler.state_dict().items()}
    with pytest.raises(ValueError, match=r"the state has clusters starting at \[0, 87"):
        sampler.load_state_dict(_curriculum(clusters=7).state_dict())
    with pytest.raises(ValueError, match="does not belong to CurriculumTimestepSampler"):
        sampler.load_state_dict(_base().state_dict())
    with pytest.raises(ValueError, match=r"unexpected \[\].*|missing \['state.average'"):
        sampler.load_state_dict(_curriculum(**FIXED).state_dict())
    for name, value in sampler.state_dict().items():
        assert torch.equal(torch.as_tensor(value), before[name])


# -- construction ----------------------------------------------------------------------------------


def test_from_scheduler_defaults_to_a_uniform_base() -> None:
    sampler = CurriculumTimestepSampler.from_scheduler(SCHEDULERS["sd"]())
    assert sampler.stages == 20
    assert sampler.pacing.expected_steps(20) == pytest.approx(19 * 1.7811 * 200, rel=1e-3)
    assert float(sampler.base.probabilities()[0]) == pytest.approx(1 / 1000, abs=1e-15)
    laplace = CurriculumTimestepSampler.from_scheduler(
        SCHEDULERS["sd"](), base={"density": "laplace", "draw": "iid"}, clusters=3
    )
    assert (laplace.draw, laplace.stages) == ("iid", 3)
    assert torch.equal(laplace.base.probabilities(), _base().probabilities())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"order": "upwards"}, r"order='upwards' is unknown: choose from easy_to_hard"),
        ({"within": "equal"}, r"within='equal' is unknown: choose from base, balanced"),
        ({"clusters": 0}, r"clusters=0"),
        ({"clusters": 1001}, r"clusters=1001"),
        ({"clustering": "kmeans"}, r"'kmeans' is unknown"),
        ({"clustering": "log_snr_width", "clusters": 500}, r"clusters empty"),
        ({"pacing": "eager"}, r"pacing 'eager' is unknown"),
        ({"pacing": "fixed", "pacing_args": {"patience": 2}}, r"no parameter 'patience'"),
        ({"pacing_args": {"patience": -5}}, r"patience=-5"),
        ({"clustering_args": {"min_size": 0}}, r"min_size=0"),
    ],
)
def test_wrong_settings_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _curriculum(**kwargs)


@pytest.mark.parametrize(
    ("order", "within", "mu"),
    [("easy_to_hard", "base", 5), ("hard_to_easy", "base", -5), ("hard_to_easy", "balanced", 5)],
)
def test_a_base_without_mass_on_a_stage_is_refused(order: str, within: str, mu: float) -> None:
    base = _base(density_args={"mu": float(mu), "b": 0.005})
    with pytest.raises(ValueError, match="the base law has no mass on stage"):
        _curriculum(base, order=order, within=within)
