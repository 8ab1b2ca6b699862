"""The scale of the data: measured, and what it does to a law."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.analysis.preview import make_preview
from diffusers_curriculum.analysis.terminal import render
from diffusers_curriculum.cli import main
from diffusers_curriculum.densities import DENSITIES, make_density
from diffusers_curriculum.samplers import named_samplers
from diffusers_curriculum.training.arguments.laws import SCALED_LAWS
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels import data_scale, timesteps
from diffusers_curriculum.training.tasks.levels import LevelTask, known_std
from tests.floors_fixtures import SCHEDULERS
from tests.training.command_lines import parse_args


def parse(*more: Any) -> Any:
    argv = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", "c"]
    return parse_args([*argv, *map(str, more)], machine=False)


def law(*more: Any, std: float | None = None) -> Any:
    args = parse(*more)
    args.data_std = std
    return timesteps.build_sampler(args, SCHEDULERS["sd"](), 0).density


# -- measuring -------------------------------------------------------------------------------------


def test_the_deviation_is_that_of_all_values_and_of_the_posterior() -> None:
    """As numpy says of samples drawn from each posterior."""
    rng = np.random.default_rng(0)
    means = [rng.normal(0.3, 1.7, (n, 4, 8, 8)) for n in (3, 2)]
    deviations = [np.full(mean.shape, 0.9) for mean in means]
    pairs = zip(means, deviations, strict=True)
    found = data_scale.measure([(torch.tensor(m), torch.tensor(d)) for m, d in pairs])
    values = np.concatenate([mean.ravel() for mean in means])
    assert found.std == pytest.approx(math.sqrt(values.var() + 0.81), rel=1e-12)
    assert (found.mean, found.samples) == (pytest.approx(values.mean(), rel=1e-12), 5)
    plain = data_scale.measure([(torch.tensor(m, dtype=torch.float32), None) for m in means])
    assert plain.std == pytest.approx(values.std(), rel=1e-6)


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_data_without_a_scale_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match=r"the first 2 samples have a variance of .*NUMBER"):
        data_scale.measure([(torch.full((2, 3, 4, 4), value), None)])


# -- the law ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 0.18215, 3.0])
def test_a_law_is_moved_by_the_scale_of_the_data(scale: float) -> None:
    """Laplace(0, 0.5) in l + 2 ln(scale)."""
    found = law("--timestep_sampler", "laplace", "--data_scale", scale)
    x = torch.linspace(-9, 9, 61, dtype=torch.float64)
    expected = stats.laplace(-2 * math.log(scale), 0.5).cdf(x.numpy())
    np.testing.assert_allclose(found.cdf(x).numpy(), expected, atol=1e-14)
    auto = law("--timestep_sampler", "laplace", "--data_scale", "auto", std=scale)
    assert torch.equal(auto.cdf(x), found.cdf(x))


def test_laws_for_data_of_a_half_are_where_they_were_at_a_half() -> None:
    x = torch.linspace(-9, 9, 61, dtype=torch.float64)
    plain = law("--timestep_sampler", "edm")
    torch.testing.assert_close(
        law("--timestep_sampler", "edm", "--data_scale", 0.5).cdf(x), plain.cdf(x)
    )
    moved = law("--timestep_sampler", "edm", "--data_scale", 1.0 + 1e-12)
    torch.testing.assert_close(moved.cdf(x - 2 * math.log(2)), plain.cdf(x), atol=1e-9, rtol=0)


def of_laws(shift: float) -> dict[str, tuple[str, dict[str, Any]]]:
    """Laws made of laws, with every place in log-SNR moved by hand."""
    table = {"log_snr": [shift - 4, shift, shift + 3], "density": [0.0, 1.0, 0.5]}
    components = [
        {"density": "laplace", "weight": 3, "mu": shift - 1, "b": 0.7},
        {"density": "normal", "weight": 1, "density_args": {"mean": shift + 4, "std": 0.5}},
        {"density": "log_snr_uniform", "low": shift - 6, "high": shift + 2},
        {"density": "spline", "points": [[shift - 5, 0], [shift + 1, 1], [shift + 5, 0.2]]},
        {"density": "tabulated", "density_args": table},
    ]
    cut = {"density": "cauchy", "mu": shift + 1, "low": shift - 2, "high": shift + 3}
    within = {"density": "mixture", "density_args": {"components": components}, "low": shift - 3}
    twice = [{"density": "truncated", "density_args": cut}, components[1]]
    edm = {"density": "edm", "p_mean": -1 - shift / 2, "high": shift + 3}
    return {
        "mixture": ("mixture", {"components": components}),
        "truncated": ("truncated", cut),
        "truncated mixture": ("truncated", within),
        "mixture of truncated": ("mixture", {"components": twice}),
        "truncated table": (
            "truncated",
            {"density": "tabulated", "density_args": table, "high": shift},
        ),
        "truncated edm": ("truncated", edm),
    }


@pytest.mark.parametrize("scale", [0.18215, 3.0])
@pytest.mark.parametrize("kind", of_laws(0.0))
def test_laws_made_of_laws_move_as_a_whole(kind: str, scale: float) -> None:
    """As those whose parts and limits are all moved by hand; those of edm from 0.5 on."""
    name, given = of_laws(0.0)[kind]
    unit = 0.5 if "edm" in kind else 1.0
    _, moved = of_laws(-2 * math.log(scale / unit))[kind]
    args = parse("--data_scale", scale, *made_of(name, **given))
    sampler = timesteps.build_sampler(args, SCHEDULERS["sd"](), 0)
    by_hand = make_density(name, sampler.levels.edges, **moved)
    x = torch.linspace(-12, 12, 241, dtype=torch.float64)
    assert isinstance(sampler, DensityTimestepSampler)
    torch.testing.assert_close(sampler.density.cdf(x), by_hand.cdf(x), atol=1e-12, rtol=0)
    masses = [law.masses(sampler.levels.edges) for law in (sampler.density, by_hand)]
    torch.testing.assert_close(masses[0], masses[1], atol=1e-12, rtol=0)
    saved = DensityTimestepSampler.from_config(sampler.config)
    assert torch.equal(saved.probabilities(), sampler.probabilities())


def test_by_default_and_at_one_nothing_moves() -> None:
    for more in ((), ("--data_scale", 1)):
        args = parse("--timestep_sampler", "laplace", *more)
        args.data_std = 0.3
        config = timesteps.build_sampler(args, SCHEDULERS["sd"](), 0).config
        assert (config["density"], config["density_args"]) == ("laplace", {})


def test_the_laws_that_have_a_scale_have_a_name() -> None:
    assert set(SCALED_LAWS) <= {*DENSITIES, *named_samplers()}


def test_a_law_that_moves_does_so_around_the_scale_of_the_data() -> None:
    moving = ("--timestep_sampler", "moving", "--timestep_sampler_args", "move_steps=9")
    for scale, measured, moved in ((0.25, None, 0.25), ("auto", None, 1.0), ("auto", 0.5, 0.5)):
        args = parse(*moving, "--data_scale", scale)
        args.data_std = measured
        sampler = timesteps.build_sampler(args, SCHEDULERS["sd"](), 0)
        assert sampler.config["data_std"] == moved
        centre = sampler.report(9).metrics["sampler/location"]
        assert centre == pytest.approx(2 - 2 * math.log(moved))
    both = parse(*moving, "data_std=2", "--data_scale", 0.25)
    with pytest.raises(UsageError, match="data_std=2: both say the scale of the data"):
        timesteps.build_sampler(both, SCHEDULERS["sd"](), 0)


LAPLACE = {"density": "laplace", "mu": 1.0}


def made_of(name: str, **own: Any) -> tuple[str, ...]:
    told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in own.items()}
    words = [f"{key}={value}" for key, value in told.items()]
    return "--timestep_sampler", name, "--timestep_sampler_args", *words


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), r"data_scale is 0\.5, which moves .* --timestep_sampler is uniform: drop"),
        (("--timestep_sampler", "beta"), "--timestep_sampler is beta"),
        (("--timestep_sampler", "loss_proportional"), "is loss_proportional"),
        (("--timestep_sampler", "normal", "--timestep_shift_preset", "sd3"), "is shifted"),
        (
            made_of("mixture", components=[LAPLACE, {"density": "uniform"}]),
            r"--timestep_sampler mixture components\[1\] is uniform: drop",
        ),
        (
            made_of("truncated", density="mode", low=0),
            "--timestep_sampler truncated density is mode",
        ),
        (
            made_of("truncated", density="mixture", components=[{"density": "mode"}], low=0),
            r"truncated density mixture components\[0\] is mode",
        ),
        (
            made_of("truncated", density="laplace", max_timestep=500),
            "truncated at max_timestep=500, which does not follow the data",
        ),
        (
            made_of("mixture", components=[LAPLACE, {"density": "edm"}]),
            r"\(.*\[0\] is laplace, for data of 1, .*\[1\] is edm, for data of 0\.5\)",
        ),
    ],
)
def test_laws_without_a_scale_are_refused(more: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse("--data_scale", 0.5, *more)


def test_what_is_no_law_at_all_is_told_by_the_law() -> None:
    for own, message in (({}, "components"), ({"components": [1]}, "names no density")):
        args = parse("--data_scale", 0.5, *made_of("mixture", **own or {"components": []}))
        with pytest.raises(UsageError, match=message):
            timesteps.build_sampler(args, SCHEDULERS["sd"](), 0)


@pytest.mark.parametrize("scale", ["0", "-1", "inf", "nan", "much"])
def test_what_is_no_scale(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--timestep_sampler", "laplace", "--data_scale", scale)
    assert "is not auto or a finite number above 0" in capsys.readouterr().err


# -- previews --------------------------------------------------------------------------------------


def test_a_preview_tells_where_the_law_lies_for_the_data() -> None:
    sampler = DensityTimestepSampler(SCHEDULERS["sd"](), "laplace", {"mu": 1.0}, floor=0.0)
    known = make_preview(sampler, data_std=0.5)
    offset = -2 * math.log(2)
    quartiles = [1 + 0.5 * math.log(0.5) + offset, 1 + offset, 1 - 0.5 * math.log(0.5) + offset]
    told = [float(v) for v in known.normalised.rpartition("quartiles ")[2].split(", ")]
    assert told == pytest.approx(quartiles, abs=0.02)
    assert "data of standard deviation 0.5: " in " ".join(render(known).split())
    assert known.to_json()["data_std"] == 0.5
    unknown = make_preview(sampler)
    assert "median 1.00 for data of 1" in unknown.normalised
    assert "-0.38 for data of 0.5" in unknown.normalised
    assert unknown.to_json()["data_std"] is None


def test_the_command_takes_a_number_and_refuses_auto(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SCHEDULERS["sd"]().save_pretrained(str(tmp_path))
    words = ["preview", str(tmp_path), "--timestep_sampler", "laplace", "--data_scale"]
    assert main([*words, "0.25"]) == 0
    assert "for data of standard deviation 0.25: quartiles -" in capsys.readouterr().out
    assert main([*words, "auto"]) == 2
    assert "measured by a run: give the number" in capsys.readouterr().err


def test_what_a_script_shows_before_training_is_what_the_last_run_measured(tmp_path: Path) -> None:
    auto = parse("--timestep_sampler", "laplace", "--data_scale", "auto", "--output_dir", tmp_path)
    plain = parse("--output_dir", tmp_path)
    assert known_std(plain) is None
    with pytest.raises(UsageError, match=r"no run in .* has measured it yet"):
        known_std(auto)
    fact = {"data_scale": {"std": 0.4, "mean": 0.0, "samples": 32}}
    (tmp_path / "run.json").write_text(json.dumps({"facts": fact}), "utf-8")
    assert known_std(auto) == known_std(plain) == 0.4


def test_auto_needs_what_the_checkpoint_measured() -> None:
    task, args = LevelTask(), parse("--timestep_sampler", "laplace", "--data_scale", "auto")
    task.remember(args, None)
    with pytest.raises(UsageError, match="the checkpoint holds no scale"):
        task.remember(args, {"seed": 1})
    task.remember(args, {"data_scale": {"std": 0.4, "mean": 0.0, "samples": 32}})
    assert args.data_std == 0.4
