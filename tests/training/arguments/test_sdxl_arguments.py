"""The command lines of Stable Diffusion XL: supersets of diffusers', in its words."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.tasks.text_to_image_lora_sdxl import TextToImageLoraSDXL
from diffusers_curriculum.training.tasks.text_to_image_sdxl import TextToImageSDXL

Facts = dict[str, Any]
ROOT = Path(__file__).parents[3]
FIXTURE = ROOT / "tests" / "fixtures" / "official_flags.json"
ALL: dict[str, list[Facts]] = json.loads(FIXTURE.read_text())
LEFT_OUT = {
    "train_text_to_image_sdxl.py": {"--enable_npu_flash_attention"},
    "train_text_to_image_lora_sdxl.py": {"--enable_npu_flash_attention", "--debug_loss"},
}
OFFICIAL = [
    pytest.param(script, fact, id=f"{script}-{fact['flag']}")
    for script, left_out in LEFT_OUT.items()
    for fact in ALL[script]
    if fact["flag"] not in left_out
]
TYPES = {"int": int, "float": float, "str": str, None: None}
BASE = ("--pretrained_model_name_or_path", "some/model", "--dataset_name", "some/data")
PARSERS = {
    "train_text_to_image_sdxl.py": TextToImageSDXL.command_line.parser(),
    "train_text_to_image_lora_sdxl.py": TextToImageLoraSDXL.command_line.parser(),
}
ACTIONS: dict[str, dict[str, argparse.Action]] = {
    script: {action.option_strings[-1]: action for action in parser._actions}
    for script, parser in PARSERS.items()
}


def parse(*more: str) -> Arguments:
    return TextToImageSDXL().parse([*BASE, *more], machine=False)


@pytest.mark.parametrize(
    ("script", "count"),
    [("train_text_to_image_sdxl.py", 59), ("train_text_to_image_lora_sdxl.py", 55)],
)
def test_official_flags_that_are_left_out_are_told_with_the_reason(script: str, count: int) -> None:
    assert len({fact["flag"] for fact in ALL[script]}) == count
    text = (ROOT / "docs" / "differences.md").read_text("utf-8")
    section = text.partition(f"\n## {script}")[2].partition("\n## ")[0]
    assert [flag for flag in LEFT_OUT[script] if f"`{flag}`" not in section] == []
    assert LEFT_OUT[script] & ACTIONS[script].keys() == set()


@pytest.mark.parametrize(("script", "fact"), OFFICIAL)
def test_official_flag_is_kept(script: str, fact: Facts) -> None:
    action = ACTIONS[script][fact["flag"]]
    is_switch = isinstance(action, argparse._StoreTrueAction)
    assert is_switch == (fact["action"] == "store_true")
    assert action.default == fact["default"]
    assert type(action.default) is type(fact["default"])
    assert action.required == fact["required"]
    if not is_switch:
        assert action.type is TYPES[fact["type"]]
        assert action.nargs == fact["nargs"]
        assert sorted(action.choices or ()) == sorted(fact["choices"] or ())


@pytest.mark.parametrize(("script", "fact"), OFFICIAL)
def test_official_abbreviations_mean_the_same(script: str, fact: Facts) -> None:
    flags = [other["flag"] for other in ALL[script]] + ["--help"]
    for length in range(3, len(fact["flag"])):
        prefix = fact["flag"][:length]
        if sum(flag.startswith(prefix) for flag in flags) == 1:
            assert PARSERS[script].resolve(prefix) == fact["flag"]


def test_row_lengths_of_text_encoders_are_refused() -> None:
    line = (*BASE, "--train_text_encoder", "--use_dora")
    with pytest.raises(UsageError, match="--use_dora with --train_text_encoder: diffusers reads"):
        TextToImageLoraSDXL().parse(line, machine=False)


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
