"""The command line of Stable Diffusion XL: a superset of diffusers', in its words."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.tasks.text_to_image_sdxl import TextToImageSDXL

ROOT = Path(__file__).parents[3]
FIXTURE = ROOT / "tests" / "fixtures" / "official_flags.json"
ALL: list[dict[str, Any]] = json.loads(FIXTURE.read_text())["train_text_to_image_sdxl.py"]
LEFT_OUT = {"--enable_npu_flash_attention"}
OFFICIAL = [fact for fact in ALL if fact["flag"] not in LEFT_OUT]
TYPES = {"int": int, "float": float, "str": str, None: None}
BASE = ("--pretrained_model_name_or_path", "some/model", "--dataset_name", "some/data")
PARSER = TextToImageSDXL.command_line.parser()
ACTIONS: dict[str, argparse.Action] = {a.option_strings[-1]: a for a in PARSER._actions}


def parse(*more: str) -> Arguments:
    return TextToImageSDXL().parse([*BASE, *more], machine=False)


def test_of_the_59_official_flags_those_left_out_are_told_with_the_reason() -> None:
    assert len({fact["flag"] for fact in ALL}) == 59
    text = (ROOT / "docs" / "differences.md").read_text("utf-8")
    section = text.partition("## train_text_to_image_sdxl.py")[2].partition("\n## ")[0]
    assert [flag for flag in LEFT_OUT if f"`{flag}`" not in section] == []
    assert LEFT_OUT & ACTIONS.keys() == set()


@pytest.mark.parametrize("fact", OFFICIAL, ids=lambda fact: fact["flag"])
def test_official_flag_is_kept(fact: dict[str, Any]) -> None:
    action = ACTIONS[fact["flag"]]
    is_switch = isinstance(action, argparse._StoreTrueAction)
    assert is_switch == (fact["action"] == "store_true")
    assert action.default == fact["default"]
    assert type(action.default) is type(fact["default"])
    assert action.required == fact["required"]
    if not is_switch:
        assert action.type is TYPES[fact["type"]]
        assert action.nargs == fact["nargs"]
        assert sorted(action.choices or ()) == sorted(fact["choices"] or ())


@pytest.mark.parametrize("fact", OFFICIAL, ids=lambda fact: fact["flag"])
def test_official_abbreviations_mean_the_same(fact: dict[str, Any]) -> None:
    flags = [other["flag"] for other in ALL] + ["--help"]
    for length in range(3, len(fact["flag"])):
        prefix = fact["flag"][:length]
        if sum(flag.startswith(prefix) for flag in flags) == 1:
            assert PARSER.resolve(prefix) == fact["flag"]


def test_empty_prompts_are_a_dropout_of_captions() -> None:
    assert parse("--proportion_empty_prompts", "0.25").caption_dropout == 0.25
    with pytest.raises(UsageError, match=r"--proportion_empty_prompts is 1.5: it must be in"):
        parse("--proportion_empty_prompts", "1.5")


@pytest.mark.parametrize(
    ("more", "law"),
    [
        ("later", {"strategy": "later", "multiplier": 3.0, "portion": 0.25}),
        ("earlier --timestep_bias_portion 0.5", {"strategy": "earlier", "portion": 0.5}),
        ("range --timestep_bias_begin 200 --timestep_bias_end 500", {"begin": 200, "end": 500}),
    ],
)
def test_a_bias_is_the_law_of_that_name_without_a_floor(more: str, law: dict[str, Any]) -> None:
    args = parse("--timestep_bias_strategy", *more.split(), "--timestep_bias_multiplier", "3")
    assert (args.timestep_sampler, args.timestep_floor) == ("timestep_bias", 0.0)
    assert law.items() <= args.timestep_sampler_args.items()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("later --timestep_bias_multiplier 0", "multiplier is 0.0: it must be finite and above 0"),
        ("range --timestep_bias_begin -1", "begin is -1: it must be at least 0"),
        ("later --timestep_bias_portion 0", "portion is 0.0: it must be above 0"),
        ("later --timestep_bias_end 500", "end is 500, which has no effect without"),
    ],
)
def test_a_bias_that_cannot_be_is_refused(more: str, told: str) -> None:
    with pytest.raises(UsageError, match=f"--timestep_bias_{told}"):
        parse("--timestep_bias_strategy", *more.split())
