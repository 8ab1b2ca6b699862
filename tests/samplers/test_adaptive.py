"""What all adaptive samplers have in common: when they learn, from what, and what they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.randomness import Slots
from diffusers_curriculum.samplers import SAMPLERS, learning_samplers
from tests.floors_fixtures import SCHEDULERS, untouched_global_generators
from tests.samplers.adaptive_fixtures import (
    KINDS,
    build,
    loss_profile,
    random_losses,
    state_hash,
    teach,
)
from tests.samplers.draws import parts

UNIFORM = torch.full((1000,), 1e-3, dtype=torch.float64)


def _is_uniform(sampler: TimestepSampler) -> bool:
    mass = sampler.probabilities()
    return bool(torch.allclose(mass, torch.full_like(mass, 1 / len(mass)), atol=1e-15))


def _run(sampler: TimestepSampler, steps: range, batch: int = 32) -> list[Tensor]:
    """Draw and observe; the indices drawn."""
    drawn = []
    for step in steps:
        drawn.append(sampler.sample(batch, step=step).indices)
        sampler.observe(drawn[-1], random_losses(step, batch), step)
    return drawn


# -- when the law changes --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_law_changes_at_refreshes_only(kind: str) -> None:
    sampler = build(kind, refresh_every=7)
    before = sampler.probabilities()
    for step in range(30):
        teach_once = torch.arange(1000).repeat(2)
        sampler.observe(teach_once, loss_profile(1000, seed=step)[teach_once], step)
        after = sampler.probabilities()
        assert (not torch.equal(before, after)) == (step % 7 == 6)
        before = after


def test_a_refresh_is_made_up_for_where_its_step_was_not_observed() -> None:
    sampler, profile = build("second_moment", refresh_every=10), loss_profile(1000)
    indices = torch.arange(1000)
    sampler.observe(indices, profile, 3)
    assert _is_uniform(sampler)
    sampler.observe(indices, profile, 12)  # 9 was not observed
    assert not _is_uniform(sampler)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_lasts_as_long_as_asked(kind: str) -> None:
    sampler, profile = build(kind, warm_up=15), loss_profile(1000)
    indices = torch.arange(1000).repeat(2)
    for step in range(20):
        assert _is_uniform(sampler) == (step < 15)
        sampler.observe(indices, profile[indices], step)


@pytest.mark.parametrize("kind", ["second_moment", "proportional", "information"])
def test_warm_up_lasts_until_every_bin_has_been_seen_often_enough(kind: str) -> None:
    sampler = build(kind, bins=10, min_observations=3, refresh_every=1)
    most = torch.arange(900)
    for step in range(5):
        sampler.observe(most, loss_profile(1000)[most], step)
    assert _is_uniform(sampler)
    assert sampler.metrics()["least_observations"] == 0
    for step, last in enumerate([950, 999, 901], 5):
        assert _is_uniform(sampler)
        sampler.observe(torch.tensor([last]), torch.tensor([0.3]), step)
    assert not _is_uniform(sampler)
    assert bool(sampler.metrics()["law_is_learned"])
    assert sampler.metrics()["least_observations"] == 3


def test_the_warm_up_density_is_drawn_from_meanwhile() -> None:
    args = {"mu": 1.0, "b": 0.8}
    sampler = build("proportional", warm_up_density="laplace", warm_up_density_args=args)
    base = DensityTimestepSampler(SCHEDULERS["sd"](), "laplace", args)
    assert torch.equal(sampler.probabilities(), base.probabilities())
    teach(sampler, loss_profile(1000), steps=5)
    assert not torch.allclose(sampler.probabilities(), base.probabilities(), rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_present_law(kind: str) -> None:
    sampler = build(kind)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for step in range(20):
        mass = sampler.probabilities().numpy()
        sample = sampler.sample(u=u)
        expected = np.searchsorted(np.cumsum(mass), u.numpy(), side="right")
        assert np.abs(sample.indices.numpy() - expected).max() <= 1  # rounding at a cell's edge
        assert np.mean(sample.indices.numpy() != expected) < 1e-3
        torch.testing.assert_close(sample.importance, sampler.importance()[sample.indices].float())
        indices = torch.arange(1000)
        sampler.observe(indices, loss_profile(1000, seed=step), step)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_frequencies_pass_a_chi_square_test(kind: str) -> None:
    sampler = build(kind, draw="iid", seed=4)
    teach(sampler, loss_profile(1000))
    drawn = torch.cat([sampler.sample(5000).indices for _ in range(20)])
    cells = torch.arange(1000) // 20
    expected = torch.zeros(50, dtype=torch.float64).index_add(0, cells, sampler.probabilities())
    counts = torch.bincount(cells[drawn], minlength=50)
    assert scipy.stats.chisquare(counts, expected * 1e5).pvalue > 1e-4


# -- what counts as an observation -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_are_not_finite_are_no_observations(kind: str) -> None:
    first, second = build(kind), build(kind)
    for step in range(10):
        indices = torch.arange(1000).repeat(2)
        losses = random_losses(step, 2000)
        bad = torch.rand(2000, generator=torch.Generator().manual_seed(step)) < 0.3
        worse = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(2000) % 3]
        first.observe(indices, torch.where(bad, worse, losses), step)
        second.observe(indices[~bad], losses[~bad], step)
    assert not _is_uniform(first)
    torch.testing.assert_close(first.probabilities(), second.probabilities(), rtol=1e-12, atol=0)
    seen = [s.metrics()["least_observations"] for s in (first, second)]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_batch_of_any_float_can_be_observed(kind: str, dtype: torch.dtype) -> None:
    sampler = build(kind)
    for step, size in enumerate([1, 64, 3, 0, 1000, 17]):
        indices = sampler.sample(size or 1).indices[:size]
        sampler.observe(indices, torch.ones(size, dtype=dtype), step)
    for step in range(6, 12):
        sampler.observe(torch.arange(1000), torch.ones(1000, dtype=dtype), step)
    mass = sampler.probabilities()
    assert bool(mass.isfinite().all())
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)


def test_a_whole_batch_of_nan_leaves_everything_as_it_was() -> None:
    sampler = build("second_moment")
    teach(sampler, loss_profile(1000))
    before = sampler.probabilities()
    for step in range(10, 30):
        sampler.observe(torch.arange(1000), torch.full((1000,), torch.nan), step)
    assert torch.equal(sampler.probabilities(), before)


def test_losses_with_a_graph_are_not_held_on_to() -> None:
    sampler = build("second_moment")
    losses = torch.ones(1000, requires_grad=True) * 2
    for step in range(5):
        sampler.observe(torch.arange(1000), losses, step)
    assert not sampler.probabilities().requires_grad
    assert not any(torch.as_tensor(v).requires_grad for v in sampler.state_dict().values())


@pytest.mark.parametrize("shape", [(3,), (4, 1), ()])
def test_one_loss_per_index_is_asked_for(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one loss per index: got indices \(4,\) and losses"):
        build("proportional").observe(torch.arange(4), torch.ones(shape), 0)


# -- floor and importance --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["sd", "cosine", "sd_zero_terminal", "flow_shift_3"])
@pytest.mark.parametrize("floor", [0.05, 0.2])
def test_the_floor_keeps_every_level(kind: str, schedule: str, floor: float) -> None:
    sampler = build(kind, schedule, floor=floor, importance_correction="full")
    profile = torch.zeros(1000)
    profile[400:420] = 1.0
    teach(sampler, profile)
    mass = sampler.probabilities()
    assert not _is_uniform(sampler)
    assert float(mass.min()) == pytest.approx(floor / 1000, rel=1e-9)
    assert float(sampler.importance().max()) <= 1 / floor * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_are_all_zero_leave_the_warm_up_law(kind: str) -> None:
    sampler = build(kind)
    teach(sampler, torch.zeros(1000))
    assert _is_uniform(sampler)


@pytest.mark.parametrize("kind", KINDS)
def test_full_correction_is_unbiased_for_the_uniform_law(kind: str) -> None:
    sampler = build(kind, importance_correction="full")
    teach(sampler, loss_profile(1000))
    mass, importance = sampler.probabilities(), sampler.importance()
    assert float((mass * importance).sum()) == pytest.approx(1, abs=1e-12)
    lam = sampler.levels.log_snr
    for f in (lam, lam.exp(), (lam > 0).double(), torch.arange(1000.0, dtype=torch.float64)):
        assert float((mass * importance * f).sum()) == pytest.approx(float(f.mean()), rel=1e-10)


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 3, 20, 41, 64])
def test_a_resumed_run_draws_and_learns_what_an_uninterrupted_one_does(
    kind: str, after: int
) -> None:
    settings: dict[str, Any] = {"bins": 8} if kind != "published" else {"min_observations": 1}
    first, second = build(kind, **settings), build(kind, **settings)
    _run(first, range(after))
    second.load_state_dict(first.state_dict())
    steps = range(after, after + 120)
    ours, theirs = _run(first, steps), _run(second, steps)
    assert sum(map(len, ours)) >= 1000
    assert torch.equal(torch.cat(ours), torch.cat(theirs))
    assert state_hash(first) == state_hash(second)
    if kind != "published":
        assert bool(first.metrics()["law_is_learned"])


def test_a_state_taken_between_refreshes_keeps_the_law_in_force() -> None:
    settings: dict[str, Any] = {"min_observations": 1, "refresh_every": 10}
    first = build("published", **settings)
    indices = torch.arange(1000)
    for step in range(10):
        first.observe(indices, loss_profile(1000), step)
    first.observe(indices, loss_profile(1000, seed=9), 10)  # not yet in the law
    second = build("published", **settings)
    second.load_state_dict(first.state_dict())
    assert not _is_uniform(first)
    assert torch.equal(first.probabilities(), second.probabilities())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_not_changed_by_later_steps(kind: str) -> None:
    sampler = build(kind)
    _run(sampler, range(7))
    state = sampler.state_dict()
    copies = {k: torch.as_tensor(v).clone() for k, v in state.items()}
    _run(sampler, range(7, 20))
    assert all(torch.equal(torch.as_tensor(state[k]), copies[k]) for k in state)
    restored = build(kind)
    restored.load_state_dict(state)
    _run(restored, range(7, 20))
    assert all(torch.equal(torch.as_tensor(state[k]), copies[k]) for k in state)


@pytest.mark.parametrize("kind", KINDS)
def test_states_hold_plain_numbers_and_tensors_only(kind: str) -> None:
    for value in build(kind).state_dict().values():
        assert isinstance(value, int | float | Tensor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", ["iid", "stratified", "sobol"])
def test_two_processes_keep_equal_states(kind: str, draw: str) -> None:
    alone, *ranks = (build(kind, bins=None, draw=draw) for _ in range(3))
    for step in range(30):
        drawn = [
            r.sample(Slots.of(16, rank=n, world_size=2), step=step).indices
            for n, r in enumerate(ranks)
        ]
        gathered, losses = torch.cat(drawn), random_losses(step, 32)
        assert torch.equal(gathered, alone.sample(Slots(0, 32, 32), step=step).indices)
        for sampler in (alone, *ranks):
            sampler.observe(gathered, losses, step)
    hashes = {state_hash(s) for s in (alone, *ranks)}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"bins": 32}, r"the state has 32 bins starting at \[0, 32, 63"),
        ({"binning": "log_snr_width"}, r"the state has \d+ bins starting at"),
        ({"schedule": "edm", "bins": None}, r"bins starting at|shape"),
    ],
)
def test_a_state_of_other_bins_is_refused_and_changes_nothing(
    other: dict[str, Any], message: str
) -> None:
    sampler = build("second_moment")
    _run(sampler, range(6))
    before = state_hash(sampler)
    stranger = build("second_moment", **other)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(stranger.state_dict())
    assert state_hash(sampler) == before


def test_states_of_other_kinds_are_refused() -> None:
    base = DensityTimestepSampler(SCHEDULERS["sd"]())
    with pytest.raises(ValueError, match="does not belong to LossProportional"):
        build("proportional").load_state_dict(base.state_dict())
    longer = build("published", min_observations=3)
    with pytest.raises(ValueError, match=r"history has shape \(1001, 3\).*\(1001, 1\)"):
        build("published").load_state_dict(longer.state_dict())
    short = build("second_moment", bins=64).state_dict() | {"state.profile": torch.zeros(10)}
    with pytest.raises(ValueError, match=r"profile has shape \(10,\)"):
        build("second_moment").load_state_dict(short)


@pytest.mark.parametrize("kind", KINDS)
def test_global_generators_are_left_alone(kind: str) -> None:
    with untouched_global_generators():
        _run(build(kind), range(12))


# -- configs ---------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"bins": 17, "binning": "log_snr_width", "ema": 0.5, "neighbours": 0, "seed": 9},
    {"warm_up_density": "laplace", "warm_up_density_args": {"b": 2.0}, "draw": "sobol"},
    {"loss_weighting": "soft_min_snr", "loss_weighting_args": {"gamma": 2.0}, "floor": 0.3},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("schedule", ["sd", "flow_shift_3", "edm"])
def test_configs_round_trip_to_equal_draws(
    kind: str, settings: dict[str, Any], schedule: str, tmp_path: Path
) -> None:
    sampler = build(kind, schedule, **settings)
    sampler.save_pretrained(str(tmp_path))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    assert type(loaded) is type(sampler)
    levels = len(sampler.levels)
    for each in (sampler, loaded):
        teach(each, loss_profile(levels), repeats=2)
    assert torch.equal(sampler.probabilities(), loaded.probabilities())
    assert state_hash(sampler) == state_hash(loaded)
    for ours, theirs in zip(parts(sampler.sample(100)), parts(loaded.sample(100)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bins": 0}, r"bins=0 must be a whole number of at least 1"),
        ({"bins": 1001}, r"bins=1001 must be a whole number from 1 to 1000"),
        ({"bins": 6.5}, r"bins=6.5 must be a whole number"),
        ({"binning": "equal"}, r"binning='equal' is unknown"),
        ({"refresh_every": 0}, r"refresh_every=0"),
        ({"warm_up": -1}, r"warm_up=-1"),
        ({"min_observations": 0}, r"min_observations=0"),
        ({"neighbours": -1}, r"neighbours=-1"),
        ({"neighbours": True}, r"neighbours=True"),
        ({"ema": 1.0}, r"ema=1.0 must lie in \[0, 1\)"),
        ({"ema": "0.9"}, r"ema='0.9'"),
        ({"floor": 0.0}, r"floor=0.0 must be greater than 0"),
        ({"floor": 1.5}, r"floor=1.5"),
        ({"draw": "dice"}, r"draw='dice'"),
        ({"importance_correction": 2}, r"importance_correction=2"),
        ({"warm_up_density": "gumbel"}, r"density 'gumbel' is unknown"),
        ({"prediction_type": "score"}, r"prediction_type='score'"),
        ({"loss_weighting": "heavy"}, r"'heavy' is unknown"),
        ({"outer_edges": "open"}, r"outer_edges='open'"),
    ],
)
@pytest.mark.parametrize("kind", ["second_moment", "information", "gradient_surrogate"])
def test_wrong_settings_are_refused(kind: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **kwargs)


def test_what_is_abstract_cannot_be_named_by_a_config() -> None:
    assert not {"AdaptiveTimestepSampler", "TimestepSampler"} & TimestepSampler.kinds().keys()
    with pytest.raises(ValueError, match="'AdaptiveTimestepSampler' is no TimestepSampler"):
        TimestepSampler.from_config({"_class_name": "AdaptiveTimestepSampler"})


def test_every_adaptive_sampler_has_its_entry() -> None:
    kinds = learning_samplers()
    assert len(kinds) == 5
    entries = [SAMPLERS.entry(name) for name in kinds]
    assert [entry.make for entry in entries] == list(kinds.values())
    assert all(entry.formula and entry.source and entry.note for entry in entries)


def test_defaults_fit_short_schedules() -> None:
    for levels, bins in ((2, 1), (10, 2), (100, 25), (1000, 64)):
        scheduler = SCHEDULERS["linear"](num_train_timesteps=levels)
        assert KINDS["second_moment"](scheduler).config["bins"] == bins


# -- as the base of a curriculum -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["sd", "sd_zero_terminal", "flow_shift_3"])
def test_a_curriculum_restricts_the_learned_law(kind: str, schedule: str) -> None:
    base = build(kind, schedule)
    sampler = CurriculumTimestepSampler(
        base, clusters=4, pacing="fixed", pacing_args={"stage_steps": 10}
    )
    indices, profile = torch.arange(1000), loss_profile(1000)
    for step in range(10):
        sampler.observe(indices, profile, step)
    law = base.law(0, torch.device("cpu"))
    assert not torch.allclose(law, UNIFORM)
    for stage in (1, 2, 4):
        opened = sampler.open_levels(stage)
        mass = sampler.probabilities(10 * stage - 5)
        share = opened.double() / opened.sum()
        expected = (1 - base.floor) * law * opened / law[opened].sum() + base.floor * share
        torch.testing.assert_close(mass, expected, rtol=1e-12, atol=1e-18)
        assert bool(opened[sampler.sample(500, step=10 * stage - 5).indices].all())
    assert torch.equal(sampler.probabilities(40), base.probabilities())


@pytest.mark.parametrize("kind", KINDS)
def test_a_curriculum_over_a_learned_law_resumes_exactly(kind: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bins": 8} if kind != "published" else {}
    first = CurriculumTimestepSampler(
        build(kind, **settings), clusters=3, pacing_args={"patience": 3}
    )
    first.save_pretrained(str(tmp_path))
    _run(first, range(33))
    second = TimestepSampler.from_pretrained(str(tmp_path))
    second.load_state_dict(first.state_dict())
    ours, theirs = _run(first, range(33, 70)), _run(second, range(33, 70))
    assert torch.equal(torch.cat(ours), torch.cat(theirs))
    assert state_hash(first) == state_hash(second)
