"""A run goes on with the defaults that it began with, also where a later version has others."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import DDPMScheduler

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.checkpoint.same_run import conflicts, keep_choices, level_facts
from diffusers_curriculum.training.levels.levels import Levels
from tests.training.command_lines import parse_args

LEARNING = ("--timestep_sampler", "loss_proportional")
ARGS = "--timestep_sampler_args"


def parse(*more: str) -> Arguments:
    return parse_args(["--pretrained_model_name_or_path", "m", "--dataset_name", "d", *more])


def facts(args: Arguments, scheduler: Any = None) -> dict[str, Any]:
    scheduler = scheduler or DDPMScheduler()
    return level_facts(args, Levels.of(args, scheduler, scheduler, seed=0))


def test_a_measure_that_was_the_default() -> None:
    saved = facts(parse(*LEARNING, ARGS, "measure=log_snr", "bins=8"))
    args = parse(*LEARNING, ARGS, "bins=8")
    assert conflicts(saved, facts(args))
    keep_choices(args, saved)
    assert args.timestep_sampler_args == {"measure": "log_snr", "bins": 8}
    assert conflicts(saved, facts(args)) == []


@pytest.mark.parametrize("curriculum", [(), ("--curriculum", "difficulty")])
def test_what_is_given_is_never_replaced(curriculum: tuple[str, ...]) -> None:
    saved = facts(parse(*LEARNING, ARGS, "measure=log_snr", *curriculum))
    told = parse(*LEARNING, ARGS, "measure=draw", *curriculum)
    keep_choices(told, saved)
    assert told.timestep_sampler_args == {"measure": "draw"}
    assert [difference.name for difference in conflicts(saved, facts(told))] == ["sampler.measure"]


@pytest.mark.parametrize("other", [(), ("--timestep_sampler", "laplace")])
def test_another_law_keeps_nothing(other: tuple[str, ...]) -> None:
    saved, args = facts(parse(*LEARNING, ARGS, "measure=log_snr")), parse(*other)
    keep_choices(args, saved)
    assert args.timestep_sampler_args == {}
    keep_choices(args, {"seed": 0})  # of a job without noise levels
