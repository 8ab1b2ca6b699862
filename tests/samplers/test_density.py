"""The density sampler: its law, its importance, its config and state."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffusers_curriculum import DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.densities import DENSITIES, make_density, on_clock
from diffusers_curriculum.randomness import DRAWS
from tests.floors_fixtures import SCHEDULERS, SD, levels_of
from tests.samplers.draws import parts

each_schedule = pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
each_density = pytest.mark.parametrize("density", sorted(DENSITIES))


def _sampler(schedule: str = "sd", density: str = "laplace", **kwargs: Any) -> Any:
    settings: dict[str, Any] = {
        "density": density,
        "density_args": DENSITIES.entry(density).example,
    } | kwargs
    return DensityTimestepSampler.from_scheduler(SCHEDULERS[schedule](), **settings)


@each_schedule
@each_density
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_mass_is_the_law_over_cells_with_a_floor(
    schedule: str, density: str, floor: float
) -> None:
    levels = levels_of(schedule)
    sampler = _sampler(schedule, density, floor=floor)
    parameters = on_clock(density, DENSITIES.entry(density).example, levels.shift)
    cells = make_density(density, levels.edges, **parameters).masses(levels.edges)
    expected = (1 - floor) * cells / cells.sum() + floor / len(levels)
    torch.testing.assert_close(sampler.probabilities(), expected, atol=1e-16, rtol=1e-12)
    assert float(sampler.probabilities().sum()) == pytest.approx(1, abs=1e-12)


@each_schedule
@each_density
@pytest.mark.parametrize("floor", [0.01, 0.1, 0.5])
def test_full_importance_is_exact_and_bounded(schedule: str, density: str, floor: float) -> None:
    sampler = _sampler(schedule, density, floor=floor, importance_correction="full")
    mass, importance = sampler.probabilities(), sampler.importance()
    assert float((mass * importance).sum()) == pytest.approx(1, abs=1e-12)
    assert float(importance.max()) <= 1 / floor + 1e-9
    uniform = torch.full_like(mass, 1 / len(mass))
    torch.testing.assert_close(mass * importance, uniform, atol=1e-15, rtol=1e-12)


@each_density
def test_a_partial_exponent_is_normalised(density: str) -> None:
    sampler = _sampler("sd", density, importance_correction=0.5)
    mass, importance = sampler.probabilities(), sampler.importance()
    assert float((mass * importance).sum()) == pytest.approx(1, abs=1e-12)
    root = (1 / (1000 * mass)).sqrt()
    torch.testing.assert_close(importance / importance[0], root / root[0], atol=0, rtol=1e-9)


def test_no_correction_gives_ones_and_full_gives_the_tables_factor() -> None:
    assert torch.equal(_sampler().sample(64).importance, torch.ones(64))
    corrected = _sampler(importance_correction="full")
    sample = corrected.sample(64)
    expected = corrected.importance().float()[sample.indices]
    assert torch.equal(sample.importance, expected)
    assert float(sample.importance.std()) > 0.1


@each_schedule
@each_density
def test_both_ends_of_the_unit_interval_are_drawn(schedule: str, density: str) -> None:
    sampler = _sampler(schedule, density, floor=0.1)
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sampler.sample(u=u).indices.tolist() == [0, len(sampler.levels) - 1]


def test_levels_below_the_smallest_number_are_never_drawn() -> None:
    sampler = _sampler("linear", "laplace", density_args={"b": 0.01}, floor=0.0)
    mass = sampler.probabilities()
    assert int((mass == 0).sum()) > 100
    u = torch.linspace(0, 1 - 2.0**-53, 100001, dtype=torch.float64)
    indices = sampler.sample(u=u).indices
    assert float(mass[indices].min()) > 0
    assert float(mass[sampler.sample(u=u[:1]).indices].min()) > 0


def test_a_law_off_the_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Laplace\(mu=5000.*has no mass on this schedule"):
        _sampler(density_args={"mu": 5000.0, "b": 0.5})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"density": "gumbel"}, "'gumbel' is unknown"),
        ({"density_args": {"scale": 1}}, "no parameter 'scale'"),
        ({"outer_edges": "open"}, "outer_edges='open' is unknown"),
        ({"density_args": {"edges": 1}}, "no parameter 'edges'"),
        ({"density_args": {"name": 1}}, "no parameter 'name'"),
    ],
)
def test_wrong_settings_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sampler(**kwargs)


def test_a_scheduler_without_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="IPNDMScheduler shows no table"):
        DensityTimestepSampler(diffusers.IPNDMScheduler())


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"density": "laplace", "floor": 0.0}, True),
        ({"density": "laplace", "floor": 0.1}, False),
        ({"density": "laplace", "density_args": {"b": 5.0}, "floor": 0.0}, False),
        ({"density": "uniform", "floor": 0.0}, False),
    ],
)
@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_a_narrow_law_without_a_floor_is_warned_of(
    settings: dict[str, Any], warns: bool, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=steps, **SD)
    with caplog.at_level(logging.WARNING):
        DensityTimestepSampler(scheduler, **settings)
    if steps == 1000:
        assert ("floor of 0.1" in caplog.text) == warns
    elif settings["density"] == "uniform":
        assert caplog.text == ""


# -- config and state ------------------------------------------------------------------------------


def _settings(sampler: TimestepSampler) -> dict[str, Any]:
    return {k: v for k, v in sampler.config.items() if not k.startswith("_")}


@each_schedule
@each_density
def test_configs_round_trip_to_equal_draws(schedule: str, density: str, tmp_path: Path) -> None:
    sampler = _sampler(schedule, density, draw="iid", floor=0.05, importance_correction=0.5, seed=7)
    sampler.save_pretrained(str(tmp_path))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    assert type(loaded) is DensityTimestepSampler
    for _ in range(3):
        for ours, theirs in zip(parts(sampler.sample(50)), parts(loaded.sample(50)), strict=True):
            assert torch.equal(ours, theirs)
    assert _settings(loaded) == _settings(sampler)


def test_every_setting_survives_the_round_trip(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "density": "normal",
        "density_args": {"mean": 0.7, "std": 1.1},
        "draw": "systematic",
        "floor": 0.2,
        "importance_correction": "full",
        "outer_edges": "inf",
        "seed": 11,
    }
    sampler = DensityTimestepSampler(SCHEDULERS["cosine"](num_train_timesteps=37), **settings)
    sampler.save_pretrained(str(tmp_path))
    loaded = DensityTimestepSampler.from_pretrained(str(tmp_path))
    assert {k: loaded.config[k] for k in settings} == settings
    assert len(loaded.levels) == 37
    assert torch.equal(loaded.probabilities(), sampler.probabilities())


def test_schedulers_with_arrays_in_their_config(tmp_path: Path) -> None:
    betas = torch.linspace(1e-4, 0.02, 50).numpy()
    sampler = DensityTimestepSampler(
        diffusers.DDPMScheduler(num_train_timesteps=50, trained_betas=betas)
    )
    sampler.save_pretrained(str(tmp_path))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.probabilities(), sampler.probabilities())


@pytest.mark.parametrize("draw", sorted(DRAWS))
def test_a_loaded_state_gives_the_same_next_draws(draw: str) -> None:
    first, second = _sampler(draw=draw), _sampler(draw=draw)
    for _ in range(17):
        first.sample(10)
    second.load_state_dict(first.state_dict())
    for _ in range(100):
        assert torch.equal(first.sample(10).indices, second.sample(10).indices)


def test_the_law_does_not_depend_on_calls_of_set_timesteps() -> None:
    scheduler = SCHEDULERS["flow_shift_3"]()
    before = DensityTimestepSampler(scheduler).probabilities()
    scheduler.set_timesteps(10)
    assert torch.equal(DensityTimestepSampler(scheduler).probabilities(), before)


def test_a_floor_that_draws_what_the_law_leaves_out_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = {"density": "laplace", "low": -2.0, "high": 2.0}
    cut = DensityTimestepSampler(SCHEDULERS["sd"](), "truncated", arguments)
    assert bool((cut.probabilities() > 0).all())
    assert "levels, but floor=0.1 draws them too: floor=0 does not" in caplog.text
    caplog.clear()
    DensityTimestepSampler(SCHEDULERS["sd"](), "truncated", arguments, floor=0.0)
    assert "draws them too" not in caplog.text
