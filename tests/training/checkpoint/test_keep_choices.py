"""A run goes on with the defaults that it began with, also where a later version has others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

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


LAPLACE = ("--timestep_sampler", "laplace", "--curriculum", "difficulty")


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("given", [(), ("--curriculum_clustering", "auto")])
def test_clusters_that_auto_made_before(again: bool, given: tuple[str, ...]) -> None:
    saved = facts(parse(*LAPLACE))
    saved["sampler"]["clustering"] = "auto"  # as it was stored
    assert conflicts(saved, facts(parse(*LAPLACE)))
    if again:  # the checkpoint of a run that was gone on with
        first = parse(*LAPLACE)
        keep_choices(first, saved)
        saved = facts(first)
    args = parse(*LAPLACE, *given)
    keep_choices(args, saved)
    assert args.curriculum_clustering == "log_snr"
    assert conflicts(saved, facts(args)) == []


def test_clusters_that_are_auto_still() -> None:
    line = ("--curriculum", "difficulty")
    args, saved = parse(*line), facts(parse(*line))
    keep_choices(args, saved)
    assert args.curriculum_clustering == "auto"
    assert conflicts(saved, facts(args)) == []
    other = parse(*line, "--curriculum_clustering", "snr")
    keep_choices(other, saved)
    assert other.curriculum_clustering == "snr"
    assert conflicts(saved, facts(other))


SHIFTED = FlowMatchEulerDiscreteScheduler(shift=3.0)
MIXED = 'components=[{"density": "mode", "scale": 0.5}, {"density": "laplace"}]'
WARM = ("warm_up_density=mode", 'warm_up_density_args={"scale": 0.5}')


def _without_shifts(value: Any) -> Any:
    """As older versions stored it."""
    if isinstance(value, list):
        return [_without_shifts(item) for item in value]
    if isinstance(value, dict):
        kept = {k: _without_shifts(v) for k, v in value.items() if k != "shift"}
        return kept | (
            {"shift": value["shift"]} if "_class_name" in value and "shift" in value else {}
        )
    return value


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "line",
    [
        ("logit_normal",),
        ("logit_normal", ARGS, "mean=0.5", "std=1.2"),
        ("mixture", ARGS, MIXED),
        ("loss_second_moment", ARGS, *WARM),
    ],
)
def test_a_law_that_did_not_move_with_its_schedule(line: tuple[str, ...], again: bool) -> None:
    def told() -> Arguments:
        return parse("--timestep_sampler", *line)

    fresh = facts(told(), SHIFTED)
    saved = fresh | {"sampler": _without_shifts(fresh["sampler"])}
    assert conflicts(saved, fresh)
    if again:
        first = told()
        keep_choices(first, saved)
        saved = facts(first, SHIFTED)
    args = told()
    keep_choices(args, saved)
    assert conflicts(saved, facts(args, SHIFTED)) == []


def test_a_law_with_other_arguments_keeps_nothing() -> None:
    saved = facts(parse("--timestep_sampler", "logit_normal", ARGS, "mean=1", "shift=1"), SHIFTED)
    for told in ({}, {"mean": 2}, {"mean": 1, "tokens": 1024}):
        words = [f"{name}={value}" for name, value in told.items()]
        args = parse("--timestep_sampler", "logit_normal", *([ARGS, *words] if words else []))
        keep_choices(args, saved)
        assert args.timestep_sampler_args == told
        assert conflicts(saved, facts(args, SHIFTED))
    wrong = parse("--timestep_sampler", "mixture")
    keep_choices(wrong, {"sampler": {"density": "mixture", "density_args": {}}})
    assert wrong.timestep_sampler_args == {}


def test_a_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    def of_file(name: str, **settings: Any) -> dict[str, Any]:
        (tmp_path / name).write_text(json.dumps({"type": "moving", **settings}))
        return facts(parse("--timestep_sampler_config", str(tmp_path / name)))

    saved = of_file("a.json", move_steps=9)
    assert saved["sampler"]["move_steps"] == 9
    assert conflicts(saved, of_file("b.json", move_steps=9)) == []
    (found,) = conflicts(saved, of_file("a.json", move_steps=8))
    assert str(found) == "sampler.move_steps is 8, was 9"


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
