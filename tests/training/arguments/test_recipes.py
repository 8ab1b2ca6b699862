"""Recipes: the settings of a paper in one word, on every command line where they apply."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.samplers import CurriculumTimestepSampler
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.recipes import RECIPES
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.unconditional import Unconditional

EVERYWHERE = ("denoising-difficulty", "min-snr")
TASKS = {"class": ClassConditional, "unconditional": Unconditional, "text": TextToImage}


def parse(script: str, *more: Any) -> Arguments:
    own = {
        "class": ("--model_config", "DiT-B/2"),
        "unconditional": (),
        "text": ("--pretrained_model_name_or_path", "a/b"),
    }
    words = [*own[script], "--train_data_dir", "images", *map(str, more)]
    return TASKS[script]().parse(words, machine=False)


def levels(script: str, *more: Any) -> Any:
    task = TASKS[script]()
    return task.choose_levels(parse(script, *more), 0)


def typed(args: Arguments, settings: dict[str, Any]) -> list[str]:
    """Settings as the words of a command line, without one that needs metrics."""
    words: list[str] = []
    for dest, value in settings.items():
        if dest != "eval_num_inference_steps":
            items = value if isinstance(value, list) else [value]
            pairs = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else items
            words += [f"--{args.flag(dest)}", *map(str, pairs)]
    return words


@pytest.mark.parametrize("script", TASKS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_flags_typed_out(name: str, script: str) -> None:
    """On a script that has them; on another it is refused, with what is in its way."""
    if script == "text" and name not in EVERYWHERE:
        with pytest.raises(UsageError, match=rf"--recipe {name} sets --formulation, which this"):
            parse(script, "--recipe", name)
        return
    args = parse(script, "--recipe", name)
    settings = RECIPES[name].settings(args)
    other = parse(script, *typed(args, settings)).tracked()
    ours = args.tracked()
    assert ours.pop("recipe") == name
    assert {k: v for k, v in ours.items() if "eval_" not in k} == {
        k: v for k, v in other.items() if "eval_" not in k
    }
    assert {dest: args[dest] for dest in settings} == settings
    assert set(settings) == args.by_recipe


def test_laplace_is_the_papers_law_without_a_floor() -> None:
    chosen = levels("class", "--recipe", "laplace-2407.03297")
    law = DensityTimestepSampler(
        chosen.scheduler, "laplace", {"mu": 0.0, "b": 0.5}, draw="iid", floor=0.0
    )
    assert torch.equal(chosen.sampler.probabilities(), law.probabilities())
    assert chosen.objective.prediction_type == "v_prediction"
    assert chosen.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert chosen.weights is None
    sampled = chosen.inference
    sampled.set_timesteps(50)
    assert type(sampled).__name__ == "DDIMScheduler"
    assert sampled.timesteps.tolist() == list(range(990, 0, -20))  # from 0.99 of the clock on
    wide = levels("class", "--recipe", "laplace-2407.03297", "--resolution", 512)
    assert wide.sampler.config["density_args"]["b"] == 0.75


def test_sd3_is_an_unweighted_flow_of_logit_normal_levels() -> None:
    for resolution, shift in ((256, 1.0), (1024, 3.0)):
        chosen = levels("class", "--recipe", "sd3", "--resolution", resolution)
        assert chosen.scheduler.config.shift == shift
        assert (chosen.objective.prediction_type, chosen.weights) == ("flow", None)
        assert (chosen.sampler.config["density"], chosen.sampler.floor) == ("logit_normal", 0.0)


@pytest.mark.parametrize(("name", "p_mean", "p_std"), [("edm", -1.2, 1.2), ("edm2", -0.4, 1.0)])
def test_log_normal_laws_follow_the_scale_of_the_data(
    name: str, p_mean: float, p_std: float
) -> None:
    for more, moved in (((), 0.0), (("--sigma_data", 1.0), 0.693147)):
        chosen = levels("unconditional", "--recipe", name, *more)
        law = chosen.sampler.density
        assert (law.p_mean, law.p_std) == (pytest.approx(p_mean + moved, abs=1e-5), p_std)
        assert (chosen.sampler.config["density"], chosen.sampler.floor) == (name, 0.0)
    assert (chosen.learned is not None) is (name == "edm2")
    assert parse("unconditional", "--recipe", "edm2").power_ema == [0.05, 0.1]


def test_denoising_difficulty_is_the_curriculum_of_twenty_clusters() -> None:
    chosen = levels("class", "--recipe", "denoising-difficulty", "--max_train_steps", 100_000)
    assert isinstance(chosen.sampler, CurriculumTimestepSampler)
    assert chosen.sampler.stages == 20
    assert chosen.sampler.config["pacing_args"]["patience"] == 200


# -- beside a recipe -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "more", "kept", "told"),
    [
        ("min-snr", ("--loss_weighting", "p2"), {"loss_weighting_args": {}}, 2),
        ("min-snr", ("--snr_gamma", 1), {"loss_weighting_args": {"gamma": 1.0}}, 2),
        ("min-snr", ("--loss_weighting", "min_snr"), {"loss_weighting": "min_snr"}, 1),
        ("denoising-difficulty", ("--curriculum_clusters", 5), {"curriculum_clusters": 5}, 1),
        ("denoising-difficulty", ("--curriculum_clusters", 20), {"curriculum_clusters": 20}, 0),
        ("laplace-2407.03297", ("--timestep_floor", 0.1), {"timestep_floor": 0.1}, 1),
        (
            "laplace-2407.03297",
            ("--timestep_sampler", "cauchy"),
            {"timestep_sampler_args": {}, "timestep_floor": 0.0},
            2,
        ),
        ("laplace-2407.03297", ("--sampling_scheduler", "DDPMScheduler"), {}, 2),
    ],
)
def test_a_flag_beside_a_recipe_wins_and_the_log_says_so(
    recipe: str, more: Any, kept: dict[str, Any], told: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        args = parse("unconditional", "--recipe", recipe, *more)
    assert {name: args[name] for name in kept} == kept
    messages = [r.message for r in caplog.records if "gives way" in r.message]
    assert len(messages) == told, messages
    assert all(f"--recipe {recipe} has --" in m and str(more[0]) in m for m in messages)


@pytest.mark.parametrize("formulation", ["ddpm", "flow"])
def test_another_formulation_is_refused(formulation: str) -> None:
    with pytest.raises(UsageError, match=rf"edm2 is for --formulation edm, .* is {formulation}: "):
        parse("class", "--recipe", "edm2", "--formulation", formulation)


def test_what_a_recipe_puts_may_be_without_effect() -> None:
    args = parse("class", "--recipe", "laplace-2407.03297", "--no_pictures")
    assert args.validation_inference_steps == 50
    with pytest.raises(UsageError, match="validation_inference_steps is 50, which has no effect"):
        parse("class", "--validation_inference_steps", 50, "--no_pictures")


def test_sampling_settings_that_cannot_be() -> None:
    for word, message in (("spam=1", "no such setting"), ("beta_end=1", "what is trained says it")):
        with pytest.raises(UsageError, match=f"--sampling_scheduler_args has .*{message}"):
            levels("class", "--sampling_scheduler_args", word)
    chosen = levels("class", "--sampling_scheduler_args", "timestep_spacing=trailing")
    assert chosen.inference.config.timestep_spacing == "trailing"


def test_the_docs_name_every_recipe() -> None:
    text = (Path(__file__).parents[3] / "docs" / "differences.md").read_text("utf-8")
    for name, recipe in RECIPES.items():
        assert f"`{name}`" in text
        assert recipe.source in text
