"""A sampler that learns is one file: written, imported, and known everywhere by its name."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin

from diffusers_curriculum import TimestepSampler, samplers
from diffusers_curriculum.samplers import (
    SAMPLERS,
    AdaptiveTimestepSampler,
    describe_config,
    learning_samplers,
)
from diffusers_curriculum.samplers.description import plain_config
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels import timesteps
from docs import generate_catalogue
from tests.floors_fixtures import SCHEDULERS
from tests.training.command_lines import parse_args

FILE = '''
from diffusers_curriculum.checks import above_zero, checked
from diffusers_curriculum.samplers import SAMPLERS, AdaptiveTimestepSampler


@SAMPLERS.register("loss_power", formula="p(l) ~ E[loss]^power", source="a test", note="learns")
class LossPowerTimestepSampler(AdaptiveTimestepSampler):
    """p(l) proportional to E[loss]^power."""

    power: float = checked(above_zero, default=0.5)
    warm_up = 5
    refresh_every = 5
    min_observations = 1

    def _rule(self, profile, constants):
        return profile**self.power
'''
NAME = "LossPowerTimestepSampler"


@pytest.fixture(params=["imported by the user", "in the folder of the package"])
def own(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The module that holds one more sampler; nothing else is written or called."""
    (tmp_path / "loss_power.py").write_text(FILE)
    if request.param == "imported by the user":
        monkeypatch.syspath_prepend(tmp_path)
        name = "loss_power"
        importlib.import_module(name)
    else:
        name = f"{samplers.__name__}.loss_power"
        monkeypatch.setattr(samplers, "__path__", [*samplers.__path__, str(tmp_path)])
        samplers.import_all()
    yield sys.modules[name]
    SAMPLERS.remove("loss_power")
    del sys.modules[name]


@pytest.fixture
def parse(tmp_path: Path) -> Any:
    (tmp_path / "a.png").touch()
    argv = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path)]
    argv += ["--output_dir", str(tmp_path / "out")]
    return lambda *more: parse_args([*argv, *map(str, more)])


def test_it_is_in_the_catalogue(own: ModuleType) -> None:
    kind = getattr(own, NAME)
    assert SAMPLERS["loss_power"] is learning_samplers()["loss_power"] is kind
    assert TimestepSampler.kinds()[NAME] is kind
    assert kind.name() == "loss_power"
    row = next(r for r in generate_catalogue.catalogue().splitlines() if "`loss_power`" in r)
    assert "`p(l) ~ E[loss]^power`" in row
    assert "power=0.5" in row
    assert "warm_up=5" in row


def test_the_training_scripts_find_it_by_name(own: ModuleType, parse: Any) -> None:
    flags = ("--timestep_sampler", "loss_power", "--timestep_sampler_args", "power=2", "bins=10")
    args = parse(*flags, "--loss_weighting", "min_snr")
    sampler = timesteps.build_sampler(args, SCHEDULERS["sd"](), 3)
    assert type(sampler) is getattr(own, NAME)
    assert (sampler.power, sampler.bins, sampler.loss_weighting) == (2, 10, "min_snr")
    # its own draw, floor and correction, and not those of densities
    assert (sampler.draw, sampler.floor, sampler.exponent, sampler.seed) == (
        "stratified",
        0.1,
        1,
        3,
    )
    wrong = parse("--timestep_sampler", "loss_power", "--timestep_sampler_args", "power=0")
    with pytest.raises(UsageError, match="--timestep_sampler: power=0 must be greater than 0"):
        timesteps.build_sampler(wrong, SCHEDULERS["sd"](), 3)


def test_its_config_brings_it_back(own: ModuleType, tmp_path: Path) -> None:
    kind = getattr(own, NAME)
    sampler = kind(SCHEDULERS["sd"](), power=2.0, seed=4)
    sampler.save_pretrained(str(tmp_path))
    for again in (
        TimestepSampler.from_pretrained(str(tmp_path)),
        TimestepSampler.from_config(plain_config(sampler)),
        kind.from_config(sampler.config),
    ):
        assert type(again) is kind
        assert plain_config(again) == plain_config(sampler)
        assert again.describe() == "loss_power, floor=0.1, power=2.0"
        assert describe_config(plain_config(again)) == again.describe()


def test_it_learns(own: ModuleType) -> None:
    sampler = getattr(own, NAME)(SCHEDULERS["sd"](), bins=1000, neighbours=0, floor=1e-6)
    indices, losses = torch.arange(1000), torch.linspace(1, 4, 1000, dtype=torch.float64)
    uniform = sampler.probabilities(0)
    for step in range(5):
        assert torch.equal(sampler.probabilities(step), uniform)
        sampler.observe(indices, losses, step)
    torch.testing.assert_close(
        sampler.probabilities(5), losses.sqrt() / losses.sqrt().sum(), rtol=1e-4, atol=0
    )


def test_once_it_is_gone_nothing_knows_it(parse: Any) -> None:
    args = parse("--timestep_sampler", "loss_power")
    with pytest.raises(UsageError, match=r"'loss_power' is unknown: choose from .*loss_prop"):
        timesteps.build_sampler(args, SCHEDULERS["sd"](), 3)


# -- how its arguments are read --------------------------------------------------------------------


@pytest.mark.parametrize("kind", learning_samplers().values(), ids=lambda k: k.__name__)
def test_every_argument_is_in_the_signature_the_config_and_the_docstrings(kind: Any) -> None:
    parameters = inspect.signature(kind).parameters
    shared = inspect.signature(AdaptiveTimestepSampler).parameters
    assert next(iter(parameters)) == "scheduler"
    assert list(parameters)[: len(shared)] == list(shared)
    assert set(inspect.signature(kind.__init__).parameters) == {"self", *parameters}
    keywords = [p for p in parameters.values() if p.name != "scheduler"]
    assert {p.kind for p in keywords} == {inspect.Parameter.KEYWORD_ONLY}
    sampler = kind(SCHEDULERS["flow"]())
    assert set(sampler.config) == set(parameters)
    assert isinstance(sampler, ConfigMixin)
    text = f"{kind.__doc__}{AdaptiveTimestepSampler.__doc__}"
    assert [name for name in parameters if f"{name}:" not in text and f"{name}," not in text] == []


# As configs and manifests of every version have them.
CONFIG: dict[str, Any] = {
    "bins": 64,
    "binning": "quantile",
    "refresh_every": 100,
    "warm_up": 1000,
    "min_observations": 10,
    "ema": 0.9,
    "neighbours": 1,
    "warm_up_density": "uniform",
    "warm_up_density_args": {},
    "prediction_type": None,
    "loss_weighting": "none",
    "loss_weighting_args": {},
    "draw": "stratified",
    "floor": 0.1,
    "importance_correction": "full",
    "outer_edges": "half",
    "seed": 0,
}
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "auto": (
        {"sharpness": 0.5, "significance": 1.0, "least_progress": 1e-3, "bandwidth": 1.0},
        {
            "floor": 0.5,
            "refresh_every": 50,
            "warm_up": 100,
            "warm_up_density": "laplace",
            "warm_up_density_args": {"mu": -0.5, "b": 1.0},
            "importance_correction": "none",
        },
    ),
    "loss_second_moment": ({}, {"warm_up": 0}),
    "loss_proportional": ({"measure": "draw"}, {}),
    "information_rate": (
        {"gate": None, "gate_power": 3.0, "onset": 0.002, "max_x0_error": 1.0},
        {"warm_up": 2000, "importance_correction": "none"},
    ),
    "gradient_norm": ({"mode": "gradients"}, {"bins": 16, "min_observations": 4}),
}


@pytest.mark.parametrize("name", learning_samplers())
def test_configs_have_the_keys_values_and_order_that_they_always_had(name: str) -> None:
    """A run of an older version goes on only if its sampler says the same of itself."""
    own, changed = OWN[name]
    kind = learning_samplers()[name]
    config = plain_config(kind(SCHEDULERS["sd"]()))
    assert config.pop("_class_name") == kind.__name__
    assert config.pop("scheduler")["_class_name"] == "DDPMScheduler"
    assert list(config.items()) == list((own | CONFIG | changed).items())
    config = plain_config(kind(SCHEDULERS["flow"](), continuous=True))
    assert list(config)[-1] == "continuous"  # told where it is on


def test_another_default_keeps_type_and_check() -> None:
    class Hasty(AdaptiveTimestepSampler):
        warm_up = 3
        floor: float = 0.2

        def _rule(self, profile: Any, constants: Any) -> Any:
            return profile

    scheduler = SCHEDULERS["sd"]()
    parameters = inspect.signature(Hasty).parameters
    assert parameters["warm_up"].default == 3
    assert parameters["warm_up"].annotation == "int"
    assert parameters["floor"].default == 0.2
    assert Hasty(scheduler).config["warm_up"] == 3
    wrongs: list[dict[str, Any]] = [{"warm_up": -1}, {"floor": 1.5}, {"bins": 0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            Hasty(scheduler, **wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'warmup'"):
        Hasty(scheduler, warmup=3)  # pyright: ignore
