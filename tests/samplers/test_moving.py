"""A law that moves from noise to detail and then widens: its masses, its way, its state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from diffusers_curriculum import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    MovingTimestepSampler,
    SequenceTimestepSampler,
    TimestepSampler,
)
from diffusers_curriculum.densities import DENSITIES, make_density
from diffusers_curriculum.samplers import SAMPLERS
from diffusers_curriculum.samplers.description import plain_config
from diffusers_curriculum.samplers.stages import Progress, reads_freely
from tests.floors_fixtures import SCHEDULERS
from tests.samplers.draws import parts

# By the issue: parameters of a law whose centre is m and whose width is b in log-SNR.
PLACED = {
    "laplace": lambda m, b: {"mu": m, "b": b},
    "cauchy": lambda m, b: {"mu": m, "gamma": b},
    "cosine_shifted": lambda m, b: {"mu": m},
    "normal": lambda m, b: {"mean": m, "std": b},
    "logistic": lambda m, b: {"mu": m, "s": b},
    "split_normal": lambda m, b: {"mu": m},
    "style_friendly": lambda m, b: {"mean": m, "std": b},
    "logit_normal": lambda m, b: {"mean": -m / 2, "std": b / 2, "shift": 1.0},
    "edm": lambda m, b: {"p_mean": -m / 2, "p_std": b / 2},
    "edm2": lambda m, b: {"p_mean": -m / 2, "p_std": b / 2},
}
WIDENS = sorted(set(PLACED) - {"cosine_shifted", "split_normal"})
PATIENT = {"pacing": "patience", "pacing_args": {"patience": 2}, "positions": 4}


def moving(schedule: str = "sd", **settings: Any) -> MovingTimestepSampler:
    given: dict[str, Any] = {"move_steps": 100, "widen_steps": 80} | settings
    return MovingTimestepSampler(SCHEDULERS[schedule](), **given)


def in_stages(schedule: str = "sd", **settings: Any) -> MovingTimestepSampler:
    return moving(schedule, **{"move_steps": None, "widen_steps": 6, **PATIENT, **settings})


def place(step: int) -> tuple[float, float]:
    """Location and scale of the defaults: 64 positions over 100 steps by the root, then over 80."""
    moved = math.floor(63 * math.sqrt(min(step, 100) / 100) + 1e-9) / 63
    widened = math.floor(63 * min(max(step - 100, 0), 80) / 80) / 63
    return -1 + 3 * moved, 1 + widened


# -- the law ---------------------------------------------------------------------------------------


def test_those_that_can_be_moved() -> None:
    assert {name for name, kind in DENSITIES.items() if kind.placement} == set(PLACED)
    assert SAMPLERS["moving"] is MovingTimestepSampler


@pytest.mark.parametrize("schedule", ["sd", "flow_shift_3", "edm"])
@pytest.mark.parametrize("density", WIDENS)
def test_masses_are_the_densitys_own_at_the_place_of_the_step(density: str, schedule: str) -> None:
    sampler = moving(schedule, density=density, floor=0.0)
    for step in (0, 1, 7, 50, 99, 100, 101, 140, 179, 180, 5000):
        law = make_density(density, sampler.levels.edges, **PLACED[density](*place(step)))
        masses = law.masses(sampler.levels.edges)
        wanted = masses / masses.sum()
        torch.testing.assert_close(sampler.probabilities(step), wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("density", ["cosine_shifted", "split_normal"])
def test_a_law_without_one_scale_moves_and_keeps_its_width(density: str) -> None:
    own = {"std_clean": 3.0} if density == "split_normal" else {}
    sampler = moving(density=density, density_args=own, widen_steps=0)
    for step in (0, 30, 100, 400):
        arguments = own | PLACED[density](place(step)[0], 0)
        still = DensityTimestepSampler(SCHEDULERS["sd"](), density, arguments)
        torch.testing.assert_close(sampler.probabilities(step), still.probabilities())
    for name, value in {"scale_start": 2.0, "scale_end": 2.0, "widen_steps": 5}.items():
        with pytest.raises(ValueError, match=f"{name}={value}.* has no scale to set"):
            moving(density=density, **{"widen_steps": 0, name: value})


def test_the_location_is_where_the_law_lies_whatever_the_shift_of_the_schedule() -> None:
    for schedule in ("flow", "flow_shift_3"):
        density = moving(schedule, density="logit_normal").density_at(100)
        assert float(density.icdf(torch.tensor(0.5, dtype=torch.float64))) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("pacing", "shape"),
    [
        ("linear", lambda p: p),
        ("root", math.sqrt),
        ("cosine", lambda p: (1 - math.cos(math.pi * p)) / 2),
    ],
)
def test_the_way_has_the_shape_of_its_pacing(pacing: str, shape: Any) -> None:
    sampler = moving(pacing=pacing, positions=256, location_start=-3.0, location_end=3.0)
    found = [sampler.report(step).metrics["sampler/location"] for step in range(101)]
    wanted = [-3 + 6 * shape(step / 100) for step in range(101)]
    behind = np.array(wanted) - np.array(found)
    assert behind.min() > -1e-9
    assert behind.max() < 6 / 255
    assert (found[0], found[-1]) == (-3.0, 3.0)


def test_the_data_scale_moves_the_location_alone() -> None:
    told = moving(data_std=0.5).report(100).metrics
    assert told == {"sampler/location": 2.0 - 2 * math.log(0.5), "sampler/scale": 1.0}


def test_by_stages_of_a_fixed_length() -> None:
    sampler = moving(
        pacing="fixed", pacing_args={"stage_steps": 10}, move_steps=None, positions=4, widen_steps=6
    )
    found = [sampler.report(step).metrics for step in (0, 9, 10, 29, 30, 31, 32, 34, 36, 99)]
    assert [m["sampler/location"] for m in found] == [-1, -1, 0, 1, 2, 2, 2, 2, 2, 2]
    scales = [m["sampler/scale"] for m in found]
    assert scales == pytest.approx([1, 1, 1, 1, 1, 1, 4 / 3, 5 / 3, 2, 2])


def test_drawn_levels_follow_the_law_of_their_step() -> None:
    for draw in ("iid", "stratified"):
        sampler = moving(draw=draw, seed=5)
        for step in (0, 40, 150):
            indices = sampler.sample(200_000, step=step).indices
            counts = torch.bincount(indices, minlength=1000).double()
            wanted = sampler.probabilities(step) * 200_000
            groups = torch.arange(1000) // 50
            seen, expected = (
                torch.zeros(20, dtype=torch.float64).index_add(0, groups, each).numpy()
                for each in (counts, wanted)
            )
            assert stats.chisquare(seen, expected).pvalue > 1e-4
            if draw == "stratified":
                assert float((counts.cumsum(0) - wanted.cumsum(0)).abs().max()) < 3


def test_floor_and_importance_correct_to_uniform_levels() -> None:
    sampler = moving(importance_correction="full", floor=0.25)
    for step in (0, 50, 170):
        mass, importance = sampler.probabilities(step), sampler.importance(step)
        assert float(mass.min()) >= 0.25 / 1000
        torch.testing.assert_close(
            mass * importance, torch.full_like(mass, 1e-3), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("schedule", ["flow", "edm"])
def test_continuous_draws_have_the_density_of_their_step(schedule: str) -> None:
    sampler = moving(schedule, continuous=True, floor=0.0, draw="iid")
    for step in (0, 150):
        log_snr = sampler.sample(20_000, step=step).log_snr
        assert log_snr is not None
        law = stats.laplace(*place(step))
        edges = sampler.levels.edges.numpy()
        low, high = law.cdf(max(edges[-1], -99)), law.cdf(min(edges[0], 99))
        uniform = (law.cdf(log_snr.numpy()) - low) / (high - low)
        assert stats.kstest(uniform, "uniform").pvalue > 1e-4


def test_a_table_is_made_for_each_place_and_not_for_each_step(monkeypatch: Any) -> None:
    sampler, made = moving(move_steps=3000, widen_steps=0), []
    own = sampler._drawn
    monkeypatch.setattr(sampler, "_drawn", lambda place: made.append(place) or own(place))
    for step in range(3100):
        sampler.sample(4, step=step)
    assert made == list(range(64))


# -- a pacing that learns --------------------------------------------------------------------------


def train(sampler: TimestepSampler, steps: range) -> list[torch.Tensor]:
    drawn = []
    for step in steps:
        sample = sampler.sample(8, step=step)
        losses = ((sample.indices * 7919 + step * 104729) % 1009).float() / 1024
        sampler.observe(sample.indices, losses, step)
        drawn += parts(sample)
    return drawn


def test_patience_moves_it_by_a_position_when_the_loss_has_stopped_falling() -> None:
    sampler, seen = in_stages(), []
    assert sampler.learns
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, *[2.0] * 9]):
        seen.append(tuple(sampler.report(step).metrics.values()))
        sampler.observe(torch.arange(4), torch.full((4,), loss), step)
    # stages end at steps 3, 6 and 9; from 10 on the scale takes 6 steps
    assert [m for m, _ in seen] == [-1.0] * 4 + [0.0] * 3 + [1.0] * 3 + [2.0] * 9
    wide = [1, 1, 4 / 3, 4 / 3, 5 / 3, 5 / 3, 2, 2, 2]
    assert [b for _, b in seen] == pytest.approx([1.0] * 10 + wide)
    starts, how = sampler.stage_starts(19)
    assert (starts, how) == ([0, 4, 7, 10, 12, 14, 16], "stages as they opened")


@pytest.mark.parametrize("build", [moving, in_stages, lambda: in_stages("flow", continuous=True)])
def test_a_resumed_one_goes_on_with_the_same_bits(build: Any) -> None:
    whole = build()
    train(whole, range(11))
    again = TimestepSampler.from_config(plain_config(whole))
    again.load_state_dict(whole.state_dict())
    later = range(11, 50)
    for mine, theirs in zip(train(whole, later), train(again, later), strict=True):
        assert torch.equal(mine, theirs)
    assert whole.report(50) == again.report(50)


def test_steps_alone_say_where_it_is() -> None:
    assert moving().state_dict() == {"calls": 0}
    one, other = moving(), moving()
    train(one, range(60))
    assert torch.equal(one.sample(64, step=60).indices, other.sample(64, step=60).indices)


@pytest.mark.parametrize("continuous", [False, True])
def test_losses_on_a_device_take_the_same_places(continuous: bool, monkeypatch: Any) -> None:
    """There the stage is a tensor, by which a step chooses among the laws of all places."""
    host = in_stages("flow", continuous=continuous)
    device = in_stages("flow", continuous=continuous)
    monkeypatch.setattr("diffusers_curriculum.samplers.stages.reads_freely", lambda device: False)
    device._progress = Progress(device.course.pacing, device.course.positions)
    ahead = train(device, range(30))
    assert isinstance(device._place(20), torch.Tensor)
    monkeypatch.setattr("diffusers_curriculum.samplers.stages.reads_freely", reads_freely)
    for mine, theirs in zip(train(host, range(30)), ahead, strict=True):
        assert torch.equal(mine, theirs)


# -- composition -----------------------------------------------------------------------------------


def test_a_curriculum_restricts_the_law_of_the_step() -> None:
    base = moving()
    sampler = CurriculumTimestepSampler(base, 5, pacing="fixed", pacing_args={"stage_steps": 20})
    for step in (0, 30, 70, 120, 400):
        opened = sampler.open_levels(sampler.stage(step)).double()
        law = moving().law(step, torch.device("cpu")) * opened
        wanted = 0.9 * law / law.sum() + 0.1 * opened / opened.sum()
        torch.testing.assert_close(sampler.probabilities(step), wanted)


def test_as_a_phase_its_way_begins_with_the_phase() -> None:
    scheduler = SCHEDULERS["sd"]()
    first = {"density": "uniform", "draw": "stratified"}
    own = {"_class_name": "MovingTimestepSampler", "move_steps": 100, "widen_steps": 80}
    phases = [{"until": 50, "sampler": first}, {"until": None, "sampler": own}]
    sampler = SequenceTimestepSampler.from_scheduler(scheduler, phases)
    for step in (0, 37, 160):
        assert torch.equal(sampler.probabilities(50 + step), moving().probabilities(step))


# -- config and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"density": "edm", "widen_steps": 0, "scale_start": 3.0},
        {"density": "cosine_shifted", "widen_steps": 0},
        {"move_steps": None, **PATIENT},
        {"positions": 7, "scale_end": 0.5, "data_std": 0.3, "seed": 9, "floor": 0.0},
    ],
)
def test_the_config_makes_the_same_sampler(settings: dict[str, Any], tmp_path: Path) -> None:
    sampler = moving(**settings)
    sampler.save_pretrained(str(tmp_path))
    again = TimestepSampler.from_pretrained(str(tmp_path))
    assert type(again) is MovingTimestepSampler
    assert plain_config(again) == plain_config(sampler)
    for step in (0, 60, 150):
        assert torch.equal(again.probabilities(step), sampler.probabilities(step))


def test_it_tells_its_way_in_words() -> None:
    assert moving().describe() == (
        "moving laplace, floor=0.1; location -1 to 2 in 100 steps (root), then scale 1 to 2 in 80"
    )
    assert in_stages(widen_steps=0, floor=0.0, location_end=4).describe() == (
        "moving laplace; location -1 to 4 by patience(patience=2), scale 1"
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"density": "uniform"}, "'uniform' has no location to move: choose from laplace, cauchy"),
        ({"density": "laplac"}, "is 'laplace' meant"),
        ({"density_args": {"mu": 3}}, "density_args has mu=3, which changes over the run"),
        ({"density": "logit_normal", "density_args": {"shift": 3}}, "has shift=3, which changes"),
        ({"density": "logit_normal", "density_args": {"tokens": 9}}, "tokens=9 each say what the"),
        ({"density_args": {"c": 3}}, "no parameter 'c'"),
        ({"location_start": math.nan}, "location_start=nan is not a finite number"),
        ({"location_end": "2"}, "location_end='2' is not a finite"),
        ({"location_end": 1e9, "density": "normal"}, "has no mass on this schedule"),
        ({"scale_start": 0}, "scale_start=0 must be greater"),
        ({"scale_end": -1}, "scale_end=-1 must be greater"),
        ({"scale_end": 2, "widen_steps": 0}, "scale_end=2 has no effect with widen_steps=0"),
        ({"widen_steps": -1}, "widen_steps=-1 must be a whole number"),
        ({"move_steps": 0}, "move_steps=0 must be a whole number"),
        ({"positions": 1}, "positions=1 must be a whole number from 2 to 256"),
        ({"positions": 257}, "positions=257 must be"),
        ({"pacing": "rot"}, "is 'root' meant"),
        ({"pacing": "patience"}, "move_steps=100 has no effect with pacing='patience'"),
        ({"pacing_args": {"total_steps": 4}}, "total_steps=4: say move_steps instead"),
        ({"data_std": 0}, "data_std=0 must be greater"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        moving(**settings)


@pytest.mark.parametrize(
    ("arguments", "steps", "found"),
    [
        ({"move_share": 0.25, "widen_share": 1}, 400, {"move_steps": 100, "widen_steps": 400}),
        ({"move_share": 0.001}, 10, {"move_steps": 1}),
        ({"move_steps": 7}, None, {"move_steps": 7}),
        ({"pacing": "patience"}, None, {"pacing": "patience"}),
        ({}, 400, "needs the steps in which its location moves: move_steps=N, or move_share=0.25"),
        ({"move_share": 0.5}, None, "move_share=0.5 needs the length of the run"),
        ({"move_share": 0.5, "move_steps": 3}, 9, "move_share=0.5 and move_steps=3 both say"),
        ({"move_share": 1.5}, 9, "move_share=1.5 must lie in"),
    ],
)
def test_shares_of_a_run(arguments: dict[str, Any], steps: int | None, found: Any) -> None:
    if isinstance(found, dict):
        assert MovingTimestepSampler.of_run(arguments, steps) == found
        return
    with pytest.raises(ValueError, match=found):
        MovingTimestepSampler.of_run(arguments, steps)
