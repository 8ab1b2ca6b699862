"""What reaches a tracker."""

from __future__ import annotations

import json

import pytest

from diffusers_curriculum.training.loop.task import Task
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from tests.training import command_lines as arguments

BASE = ("--pretrained_model_name_or_path", "some/model", "--dataset_name", "some/data")
# Arguments that say nothing about the result, and the one that is secret.
UNTRACKED = {"hub_token", "local_rank", "show_timesteps"}


def test_the_token_never_appears():
    args = arguments.parse_args([*BASE, "--hub_token", "hf_secret", "--report_to", "all"])
    assert args.hub_token == "hf_secret"
    assert "hf_secret" not in json.dumps(args.tracked())


def test_an_argument_that_is_not_declared_is_not_tracked():
    args = arguments.parse_args(BASE)
    args.password = "x"
    assert "password" not in args.tracked()


@pytest.mark.parametrize("task", [TextToImage, TextToImageLora, ClassConditional, Unconditional])
def test_every_argument_is_either_tracked_or_left_out_on_purpose(task: type[Task]):
    untracked = {flag.name for flag in task.command_line.flags if not flag.tracked}
    assert untracked == UNTRACKED


def test_only_scalars_and_no_unset_ones():
    line = (
        "--validation_prompts seven nine --timestep_sampler laplace --timestep_sampler_args mu=0.5 "
        "b=1 --curriculum difficulty --curriculum_clustering explicit --curriculum_boundaries 0 500"
    )
    args = arguments.parse_args([*BASE, *line.split()])
    config = args.tracked()
    assert all(type(value) in (bool, int, float, str) for value in config.values())
    assert config["timestep_sampler_args"] == "mu=0.5 b=1"
    assert config["validation_prompts"] == "['seven', 'nine']"
    assert config["curriculum_boundaries"] == "[0, 500]"
    assert "revision" not in config
    assert config["noise_offset"] == 0
    assert config["use_ema"] is False
