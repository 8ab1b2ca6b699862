"""Presets of a shift, the slower inputs of MixFlow, and what is told of laws that learn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from diffusers_curriculum import DensityTimestepSampler, Slots
from diffusers_curriculum.densities import SHIFT_PRESETS
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.randomness import gaussian
from diffusers_curriculum.training.arguments import laws
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels import timesteps
from diffusers_curriculum.training.levels.guards import learning_warnings
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.run import LevelRun
from diffusers_curriculum.training.tasks.levels import check_slowed
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from tests.floors_fixtures import SCHEDULERS, levels_of
from tests.training.command_lines import parse_args


@pytest.fixture
def parse(tmp_path: Path) -> Any:
    (tmp_path / "a.png").touch()
    argv = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path)]
    argv += ["--output_dir", str(tmp_path / "out")]
    return lambda *more: parse_args([*argv, *map(str, more)])


def build(args: Any, schedule: str = "flow") -> Any:
    return timesteps.build_sampler(args, SCHEDULERS[schedule](), 3)


# -- presets ---------------------------------------------------------------------------------------


def test_the_names_of_presets_are_those_of_the_densities() -> None:
    by_tokens = {name for name, preset in SHIFT_PRESETS.items() if preset.line}
    assert set(laws.TOKEN_PRESETS) == by_tokens
    assert set(laws.FIXED_PRESETS) == set(SHIFT_PRESETS) - by_tokens


@pytest.mark.parametrize(
    ("flags", "args"),
    [
        (("sd3",), {"density": "flow_uniform", "preset": "sd3"}),
        (
            ("flux", "--timestep_shift_tokens", 4096, "--timestep_sampler", "logit_normal"),
            {"density": "logit_normal", "preset": "flux", "tokens": 4096},
        ),
        (
            ("sd3", "--timestep_sampler", "normal", "--timestep_sampler_args", "std=1.5"),
            {"density": "normal", "density_args": {"std": 1.5}, "preset": "sd3"},
        ),
    ],
)
def test_a_preset_moves_the_law_that_was_asked_for(parse: Any, flags: Any, args: Any) -> None:
    parsed = parse("--timestep_shift_preset", *flags)
    sampler = build(parsed)
    expected = DensityTimestepSampler(SCHEDULERS["flow"](), "shifted", args, draw="iid", seed=3)
    assert torch.equal(sampler.probabilities(), expected.probabilities())
    assert parsed.tracked()["timestep_sampler"] == "shifted"
    assert str(args["preset"]) in str(parsed.tracked()["timestep_sampler_args"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("flux",), r"flux depends on the number of image tokens: give --timestep_shift_tokens"),
        (("sd3", "--timestep_shift_tokens", 9), r"tokens is 9, which has no effect without a "),
        (("sd3", "--timestep_sampler", "a.json"), r"a\.json is a file.*drop one of the two"),
        (("sd3", "--timestep_sampler", "loss_proportional"), r"loss_proportional.* is none of the"),
        (("sd3", "--timestep_sampler", "two_phase"), r"two_phase.* is none of the"),
        (
            ("sd3", "--timestep_sampler", "mode", "--timestep_sampler_args", "shift=2"),
            r"density_args has shift=2, a shift of its own",
        ),
    ],
)
def test_presets_that_cannot_be(parse: Any, flags: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(parse("--timestep_shift_preset", *flags))


# -- MixFlow ---------------------------------------------------------------------------------------


def test_slower_inputs_are_drawn_up_to_gamma_and_are_off_by_default() -> None:
    levels, slots = levels_of("flow"), Slots.here(4000)
    run: Any = object.__new__(LevelRun)
    run.args = Arguments(mixflow_gamma=None)
    run.levels = Arguments(objective=Objective(levels))
    at = torch.full((4000,), 300)

    def draw(shape: Any, purpose: str) -> Any:
        return gaussian(shape, seed=1, step=2, slots=slots, purpose=purpose)

    assert run.input_levels(at, draw) is at
    run.args.mixflow_gamma = 0.8
    slower = levels.coefficients(run.input_levels(at, draw))[1]
    share = ((slower - levels.sigma[300]) / (1 - levels.sigma[300])).numpy()
    assert stats.kstest(share, stats.uniform(0, 0.8).cdf).pvalue > 1e-4
    assert torch.equal(run.input_levels(at, draw), run.input_levels(at, draw))
    assert np.abs(share[1:] - share[:-1]).min() > 0  # each sample its own


def test_slower_inputs_need_a_flow(parse: Any) -> None:
    args = parse("--mixflow_gamma", 0.8)
    for schedule, refused in (("flow", False), ("sd", True), ("edm", True)):
        levels = Levels.of(args, SCHEDULERS[schedule](), SCHEDULERS[schedule](), 0)
        if not refused:
            check_slowed(args, levels)
            continue
        with pytest.raises(UsageError, match=r"--mixflow_gamma is 0\.8.*flow matching only"):
            check_slowed(args, levels)
    for wrong in (0, 1.1):
        with pytest.raises(UsageError, match=r"--mixflow_gamma is .*above 0 and at most 1"):
            parse("--mixflow_gamma", wrong)


def test_an_image_script_refuses_slower_inputs_before_it_loads_anything(tmp_path: Path) -> None:
    task = Unconditional()
    argv = ["--train_data_dir", str(tmp_path), "--output_dir", str(tmp_path), "--no_pictures"]
    args = task.parse([*argv, "--mixflow_gamma", "0.8"], machine=False)
    with pytest.raises(UsageError, match=r"--mixflow_gamma is 0\.8"):
        task.choose_levels(args, 0)


# -- laws that learn -------------------------------------------------------------------------------


def test_what_is_told_of_the_information_rate(parse: Any) -> None:
    args = parse("--timestep_sampler", "information_rate", "--loss_weighting", "min_snr")
    short, long = (list(learning_warnings(args, build(args, "sd"), n)) for n in (1000, 50_000))
    assert len(short) == 1
    assert "warm-up of 2000 updates, and the run has 1000" in short[0]
    assert "warm_up=200 " in short[0]
    assert len(long) == 2
    assert "warm_up=10000 gate=0.15" in long[0]
    assert "beside --loss_weighting min_snr" in long[1]
    told = ("--timestep_sampler_args", "warm_up=10000", "gate=0.15")
    quiet = parse("--timestep_sampler", "information_rate", *told)
    assert not list(learning_warnings(quiet, build(quiet, "sd"), 50_000))


def test_a_law_that_never_learns_is_told_inside_a_curriculum_too(parse: Any) -> None:
    more = ("--curriculum", "difficulty", "--curriculum_clusters", 2)
    args = parse("--timestep_sampler", "loss_proportional", *more)
    (warning,) = learning_warnings(args, build(args, "sd"), 900)
    assert "loss_proportional learns after a warm-up of 1000 updates" in warning
    assert not list(learning_warnings(args, build(args, "sd"), 5000))
    plain = parse("--timestep_sampler", "laplace")
    assert not list(learning_warnings(plain, build(plain, "sd"), 10))


def test_a_noise_offset_beside_the_information_rate_is_told(
    parse: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers_curriculum.training.parts.families.base import ModelFamily
    from diffusers_curriculum.training.tasks.text_to_image import TextToImage

    pair = SCHEDULERS["sd"](), SCHEDULERS["sd"]()
    monkeypatch.setattr(ModelFamily, "load_schedulers", lambda family, args: pair)
    for offset in (0, 0.1):
        args = parse("--timestep_sampler", "information_rate", "--noise_offset", offset)
        with caplog.at_level(logging.WARNING):
            TextToImage().choose_levels(args, 0)
        assert ("beside --noise_offset 0.1" in caplog.text) is bool(offset)
