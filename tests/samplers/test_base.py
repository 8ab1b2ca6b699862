"""What every sampler does: inverse cdf, ends, counting of steps, state, config, isolation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.randomness import DRAWS, Slots, uniforms
from diffusers_curriculum.samplers import SAMPLERS, base
from diffusers_curriculum.samplers.composition import compose, correction_exponent, tables
from tests.floors_fixtures import SCHEDULERS, table, untouched_global_generators
from tests.samplers.draws import parts


class FixedLaw(TimestepSampler):
    """A sampler of any given masses: all that a new sampler needs."""

    def __init__(self, masses: list[float], draw: str = "iid", seed: int = 0) -> None:
        self.masses = torch.tensor(masses, dtype=torch.float64)
        lam = torch.linspace(5, -5, len(masses), dtype=torch.float64)
        super().__init__(table(lam), draw=draw, seed=seed)
        self.register_to_config(masses=masses, draw=draw, seed=seed)

    def law(self, step: int, device: torch.device) -> Tensor:
        return self.masses.to(device)


def _sd(**kwargs: Any) -> DensityTimestepSampler:
    return DensityTimestepSampler(SCHEDULERS["sd"](), **kwargs)


def _u(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- the inverse cdf -------------------------------------------------------------------------------

JUST_BELOW_1 = 1 - 2.0**-53


def test_numbers_go_through_the_inverse_cdf() -> None:
    sampler = FixedLaw([0.5, 0.25, 0.125, 0.125])
    u = _u(0.0, 0.25, 0.4999, 0.5, 0.7499, 0.75, 0.8749, 0.875, JUST_BELOW_1)
    assert sampler.sample(u=u).indices.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("masses", "first", "last"),
    [([0, 0.5, 0, 0.5, 0], 1, 3), ([0, 0, 1], 2, 2), ([1, 0, 0], 0, 0), ([0.1] * 10, 0, 9)],
)
def test_levels_without_mass_are_never_drawn(masses: list[float], first: int, last: int) -> None:
    sampler = FixedLaw(masses)
    ends = sampler.sample(u=_u(0.0, 2.0**-60, JUST_BELOW_1)).indices.tolist()
    assert ends == [first, first, last]
    grid = sampler.sample(u=torch.linspace(0, JUST_BELOW_1, 10001, dtype=torch.float64)).indices
    drawn = torch.bincount(grid, minlength=len(masses)) > 0
    assert drawn.tolist() == [m > 0 for m in masses]


def test_a_number_of_one_draws_no_level_without_mass() -> None:
    """float32 numbers, or a careless caller, may round up to 1."""
    assert FixedLaw([0.5, 0.5, 0.0]).sample(u=_u(1.0)).indices.tolist() == [1]


@pytest.mark.parametrize("draw", sorted(DRAWS))
def test_batches_are_the_global_uniforms_through_the_inverse_cdf(draw: str) -> None:
    sampler = FixedLaw([0.1, 0.2, 0.3, 0.4], draw=draw, seed=3)
    slots = Slots(2, 3, 8)
    u = uniforms(draw, seed=3, step=6, slots=slots)
    cdf = _u(0.1, 0.3, 0.6)
    expected = (u[:, None] >= cdf).sum(1)
    assert torch.equal(sampler.sample(slots, step=6).indices, expected)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_timesteps_have_the_schedulers_own_dtype_and_values(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    sampler = DensityTimestepSampler(scheduler, "uniform")
    sample = sampler.sample(500)
    dtype = torch.int64 if sampler.levels.family == "vp" else torch.float32
    assert sample.timesteps.dtype == dtype
    assert sample.indices.dtype == torch.int64
    assert sample.importance.dtype == torch.float32
    assert sample.timesteps.shape == sample.indices.shape == sample.importance.shape == (500,)
    assert torch.equal(sample.timesteps, sampler.levels.timesteps[sample.indices])
    assert set(sample.timesteps.tolist()) <= set(scheduler.timesteps.tolist())


# -- steps and slots -------------------------------------------------------------------------------


def test_steps_are_counted_unless_they_are_given() -> None:
    counted, given = _sd(), _sd()
    for step in range(5):
        assert torch.equal(counted.sample(4).indices, given.sample(4, step=step).indices)
    assert given.state_dict() == {"calls": 0}
    assert counted.state_dict() == {"calls": 5}
    assert torch.equal(given.sample(4, step=3).indices, given.sample(4, step=3).indices)


def test_draws_differ_between_steps_seeds_and_slots() -> None:
    first = _sd().sample(64, step=0).indices
    assert not torch.equal(first, _sd().sample(64, step=1).indices)
    assert not torch.equal(first, _sd(seed=1).sample(64, step=0).indices)
    halves = [_sd().sample(Slots(s, 32, 64), step=0).indices for s in (0, 32)]
    assert torch.equal(torch.cat(halves), first)
    assert not torch.equal(halves[0], halves[1])


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 8])
def test_any_batch_size(batch: int) -> None:
    assert _sd().sample(batch).indices.shape == (batch,)


def test_draws_from_a_generator() -> None:
    sampler = _sd()

    def draw(seed: int) -> Tensor:
        return sampler.sample(16, generator=torch.Generator().manual_seed(seed)).indices

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    generator = torch.Generator().manual_seed(0)
    first, second = (sampler.sample(16, generator=generator).indices for _ in range(2))
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "arguments", [{}, {"batch": 2, "u": torch.zeros(2)}, {"step": 3}], ids=["none", "both", "step"]
)
def test_sample_takes_a_batch_or_numbers(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        _sd().sample(**arguments)


@pytest.mark.parametrize("batch", [0, -3])
def test_an_empty_batch_is_refused(batch: int) -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        _sd().sample(batch)


def test_a_refused_call_is_not_counted() -> None:
    sampler = _sd()
    with pytest.raises(ValueError, match="count must be at least 1"):
        sampler.sample(0)
    assert sampler.state_dict() == {"calls": 0}


def test_sampling_leaves_global_generators_alone() -> None:
    base = _sd()
    sampler = CurriculumTimestepSampler(base, order="random", clusters=5)
    with untouched_global_generators():
        for draw in sorted(DRAWS):
            _sd(draw=draw).sample(8)
        sampler.sample(8)
        sampler.sample(8, generator=torch.Generator().manual_seed(0))
        sampler.observe(torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), 0)


# -- what is kept ----------------------------------------------------------------------------------


class Counted(FixedLaw):
    """Counts how often its law is asked for."""

    asked = 0

    def law(self, step: int, device: torch.device) -> Tensor:
        self.asked += 1
        return super().law(step, device)


class Narrow(FixedLaw):
    """A law in float32, as on a device without float64."""

    def law(self, step: int, device: torch.device) -> Tensor:
        return super().law(step, device).float()

    def reference(self, step: int, device: torch.device) -> Tensor:
        return super().reference(step, device).float()


def test_a_static_law_is_asked_for_once_per_device() -> None:
    sampler = Counted([0.5, 0.25, 0.25])
    first = sampler.sample(8, step=3)
    for device in (None, "cpu", torch.device("cpu")):
        again = sampler.sample(8, step=3, device=device)
        assert all(torch.equal(a, b) for a, b in zip(parts(first), parts(again), strict=True))
    assert sampler.asked == 1
    for device in ("meta", torch.device("meta")):
        sample = sampler.sample(8, step=3, device=device)
        assert [part.device.type for part in parts(sample)] == ["meta"] * 3
        assert [part.dtype for part in parts(sample)] == [p.dtype for p in parts(first)]
    assert sampler.asked == 2


def test_a_changing_law_is_asked_for_at_every_draw() -> None:
    sampler = Counted([0.5, 0.25, 0.25])
    sampler.static_law = False
    for _ in range(3):
        sampler.sample(8)
    assert sampler.asked == 3


@pytest.mark.parametrize("correction", ["none", "full"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_what_is_drawn_is_what_is_told(floor: float, correction: str) -> None:
    sampler = _sd(floor=floor, importance_correction=correction)
    cdf, importance = sampler._tables(0, torch.device("cpu"))
    sums = sampler.probabilities().cumsum(0)
    assert torch.equal(cdf, sums / sums[-1])
    assert torch.equal(importance, sampler.importance().float())


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_what_is_told_may_be_written_on(floor: float) -> None:
    def told(sampler: TimestepSampler) -> tuple[Tensor, ...]:
        return sampler.probabilities(), sampler.importance(), *parts(sampler.sample(16, step=0))

    sampler = _sd(floor=floor)
    for values in told(sampler):
        values.zero_()
    for ours, fresh in zip(told(sampler), told(_sd(floor=floor)), strict=True):
        assert torch.equal(ours, fresh)


def test_numbers_of_any_shape_and_precision() -> None:
    sampler = _sd(importance_correction="full")
    u = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    square, flat = sampler.sample(u=u), sampler.sample(u=u.double().flatten())
    for ours, theirs in zip(parts(square), parts(flat), strict=True):
        assert ours.shape == (3, 4)
        assert torch.equal(ours.flatten(), theirs)


def test_own_numbers_are_rounded_down_to_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without float64 gets them in float32, where the largest becomes 1."""
    sampler = Narrow([0.25, 0.75, 0.0])
    assert set(sampler.sample(1000).indices.tolist()) == {0, 1}
    monkeypatch.setattr(base, "batch_uniforms", lambda *_, **__: _u(2.0**-53, JUST_BELOW_1).float())
    assert sampler.sample(2).indices.tolist() == [0, 1]


# -- floor and importance --------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_composition(floor: float, exponent: float) -> None:
    generator = torch.Generator().manual_seed(0)
    law = torch.rand(50, generator=generator, dtype=torch.float64).pow(6)
    law = law / law.sum()
    reference = torch.full_like(law, 1 / 50)
    mass, importance = compose(law, reference, floor, exponent)
    torch.testing.assert_close(mass, (1 - floor) * law + floor * reference, atol=1e-17, rtol=1e-14)
    ratio = (reference / mass) ** exponent
    expected = ratio / (mass * ratio).sum()
    torch.testing.assert_close(importance, expected, atol=0, rtol=1e-12)
    assert float((mass * importance).sum()) == pytest.approx(1, abs=1e-12)
    if floor > 0 and exponent == 1:
        assert float(importance.max()) <= 1 / floor + 1e-12
    if exponent == 0:
        assert torch.equal(importance, torch.ones_like(mass))
    if floor == 0:
        assert mass is law


def test_composition_of_rows() -> None:
    law = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    reference = torch.tensor([[0.5, 0.5, 0.0], [1 / 3] * 3], dtype=torch.float64)
    both, weights = compose(law, reference, 0.1, 1.0)
    for row in range(2):
        mass, importance = compose(law[row], reference[row], 0.1, 1.0)
        assert torch.equal(both[row], mass)
        torch.testing.assert_close(weights[row], importance, atol=0, rtol=1e-14)


def test_tables_end_at_exactly_one() -> None:
    for count in (3, 10, 49, 999, 1000, 1001):
        mass = torch.full((count,), 1 / count, dtype=torch.float64)
        cdf, importance = tables(mass, mass)
        assert float(cdf[-1]) == 1.0
        assert cdf.dtype == torch.float64
        assert importance.dtype == torch.float32


@pytest.mark.parametrize(
    ("correction", "exponent"), [("none", 0.0), ("full", 1.0), (0.25, 0.25), (0, 0.0), (1, 1.0)]
)
def test_names_of_corrections(correction: str | float, exponent: float) -> None:
    assert correction_exponent(correction) == exponent


# -- construction ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draw": "halton"}, r"draw='halton' is unknown: choose from iid"),
        ({"floor": -0.1}, r"floor=-0.1 must lie in \[0, 1\]"),
        ({"floor": 1.1}, r"floor=1.1"),
        ({"floor": float("nan")}, r"floor=nan"),
        ({"floor": "0.1"}, r"floor='0.1'"),
        ({"importance_correction": "half"}, r"importance_correction='half' must be"),
        ({"importance_correction": 1.5}, r"importance_correction=1.5"),
        ({"importance_correction": -0.5}, r"importance_correction=-0.5"),
        ({"importance_correction": float("nan")}, r"importance_correction=nan"),
        ({"importance_correction": True}, r"importance_correction=True"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sd(**arguments)


def test_the_base_class_needs_a_law() -> None:
    with pytest.raises(TypeError, match=r"abstract.* law"):
        TimestepSampler(table([1, 0, -1]))  # pyright: ignore


def test_metrics_are_empty_and_observing_changes_nothing_by_default() -> None:
    sampler = _sd()
    before = sampler.probabilities()
    sampler.observe(torch.tensor([1]), torch.tensor([2.0]), 0)
    assert sampler.metrics() == {}
    assert torch.equal(sampler.probabilities(), before)


# -- config and state ------------------------------------------------------------------------------


def test_every_sampler_is_registered() -> None:
    assert SAMPLERS["density"] is DensityTimestepSampler
    assert SAMPLERS["curriculum"] is CurriculumTimestepSampler
    assert all(SAMPLERS.name_of(kind) == kind.name() == name for name, kind in SAMPLERS.items())
    kinds = TimestepSampler.kinds()
    assert kinds["DensityTimestepSampler"] is DensityTimestepSampler
    assert kinds["FixedLaw"] is FixedLaw  # a custom one needs no name of its own
    assert FixedLaw.name() == "FixedLaw"


def test_a_custom_sampler_saves_and_loads(tmp_path: Path) -> None:
    sampler = FixedLaw([0.1, 0.2, 0.7], draw="sobol", seed=4)
    sampler.save_pretrained(str(tmp_path))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    assert type(loaded) is FixedLaw
    assert torch.equal(loaded.sample(100).indices, sampler.sample(100).indices)


def test_the_config_file_is_plain_json(tmp_path: Path) -> None:
    _sd(density="cauchy", density_args={"gamma": 0.5}).save_pretrained(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["timestep_sampler_config.json"]
    config = json.loads((tmp_path / "timestep_sampler_config.json").read_text())
    assert config["_class_name"] == "DensityTimestepSampler"
    assert config["scheduler"]["_class_name"] == "DDPMScheduler"
    assert config["density_args"] == {"gamma": 0.5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EulerSampler"}, r"_class_name='EulerSampler' is no TimestepSampler"),
        ({"_class_name": "os.system"}, r"_class_name='os.system' is no"),
        ({"_class_name": "DensityTimestepSampler", "denisty": "x"}, r"has no setting 'denisty'"),
        (
            {"_class_name": "DensityTimestepSampler", "scheduler": {"_class_name": "Popen"}},
            r"scheduler class 'Popen' is not one of diffusers",
        ),
        (
            {"_class_name": "DensityTimestepSampler", "scheduler": {}},
            r"scheduler class '' is not one of diffusers",
        ),
        (
            {"_class_name": "DensityTimestepSampler", "scheduler": {"_class_name": "UNet2DModel"}},
            r"scheduler class 'UNet2DModel'",
        ),
        (
            {"_class_name": "CurriculumTimestepSampler", "base": {"_class_name": "Nothing"}},
            r"_class_name='Nothing' is no TimestepSampler",
        ),
    ],
)
def test_unknown_classes_and_keys_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        TimestepSampler.from_config(config)
    (tmp_path / "timestep_sampler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        TimestepSampler.from_pretrained(str(tmp_path))


def test_a_class_loads_only_its_own_kind(tmp_path: Path) -> None:
    _sd().save_pretrained(str(tmp_path))
    assert type(DensityTimestepSampler.from_pretrained(str(tmp_path))) is DensityTimestepSampler
    with pytest.raises(ValueError, match="is no CurriculumTimestepSampler"):
        CurriculumTimestepSampler.from_pretrained(str(tmp_path))


def test_overrides_of_a_config() -> None:
    config = _sd(seed=3).config
    assert DensityTimestepSampler.from_config(config).seed == 3
    assert DensityTimestepSampler.from_config(config, seed=9).seed == 9
    linear = DensityTimestepSampler.from_config(config, scheduler=SCHEDULERS["linear"]())
    assert linear.config["scheduler"]["beta_schedule"] == "linear"


@pytest.mark.parametrize("state", [{}, {"calls": 1, "stage": 2}, {"call": 1}])
def test_a_wrong_state_is_refused(state: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="does not belong to DensityTimestepSampler: missing"):
        _sd().load_state_dict(state)


def test_a_sampler_of_a_pipeline_is_found_with_what_it_learned(tmp_path: Path) -> None:
    sampler = CurriculumTimestepSampler(_sd(), clusters=4, pacing_args={"patience": 1})
    for step in range(9):
        drawn = sampler.sample(8, step=step).indices
        sampler.observe(drawn, torch.ones(8), step)
    assert sampler.stage(9) > 1
    _sd(density="cauchy").save_pretrained(str(tmp_path))  # of an older version
    assert TimestepSampler.from_pretrained(str(tmp_path)).name() == "density"
    sampler.save_pretrained(str(tmp_path / "timestep_sampler"))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    assert loaded.stage(9) == sampler.stage(9)
    assert torch.equal(loaded.probabilities(9), sampler.probabilities(9))
    assert TimestepSampler.from_pretrained(str(tmp_path), subfolder="").name() == "density"
    (tmp_path / "timestep_sampler" / "timestep_sampler_state.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no state of a sampler"):
        TimestepSampler.from_pretrained(str(tmp_path))
