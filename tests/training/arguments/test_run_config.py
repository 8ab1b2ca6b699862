"""What reaches a tracker."""

from __future__ import annotations

import json

from diffusers_curriculum.training.arguments import text_to_image as arguments
from diffusers_curriculum.training.arguments.class_conditional import parse_class_args
from diffusers_curriculum.training.arguments.run_config import TRACKED, tracker_config
from diffusers_curriculum.training.arguments.unconditional import parse_unconditional_args

BASE = ("--pretrained_model_name_or_path", "some/model", "--dataset_name", "some/data")
# Arguments that say nothing about the result, and the one that is secret.
UNTRACKED = {"hub_token", "cache_dir", "local_rank", "show_timesteps"}


def test_the_token_never_appears():
    args = arguments.parse_args([*BASE, "--hub_token", "hf_secret", "--report_to", "all"])
    assert args.hub_token == "hf_secret"
    assert "hf_secret" not in json.dumps(tracker_config(args))


def test_an_argument_that_is_not_listed_is_not_tracked():
    args = arguments.parse_args(BASE)
    args.password = "x"
    assert "password" not in tracker_config(args)


def test_every_argument_is_either_tracked_or_left_out_on_purpose():
    data = BASE[2:]
    names = set(vars(arguments.parse_args(BASE)))
    names |= set(vars(parse_class_args(["--model_config", "DiT-S/2", *data])))
    names |= set(vars(parse_unconditional_args(data)))
    assert set(TRACKED) == names - UNTRACKED
    assert len(TRACKED) == len(set(TRACKED))


def test_only_scalars_and_no_unset_ones():
    line = (
        "--validation_prompts seven nine --timestep_sampler laplace --timestep_sampler_args mu=0.5 "
        "b=1 --curriculum difficulty --curriculum_clustering explicit --curriculum_boundaries 0 500"
    )
    args = arguments.parse_args([*BASE, *line.split()])
    config = tracker_config(args)
    assert all(type(value) in (bool, int, float, str) for value in config.values())
    assert config["timestep_sampler_args"] == "mu=0.5 b=1"
    assert config["validation_prompts"] == "['seven', 'nine']"
    assert config["curriculum_boundaries"] == "[0, 500]"
    assert "revision" not in config
    assert config["noise_offset"] == 0
    assert config["use_ema"] is False
