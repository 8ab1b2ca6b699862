"""Every flag and every abbreviation of it means what it meant before flags were declared once.

fixtures/abbreviations.json holds, for each script of version 0.1.0, its flags, and what each prefix
of an official flag resolved to.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.unconditional import Unconditional

ROOT = Path(__file__).parents[3]
BEFORE: dict[str, Any] = json.loads((ROOT / "tests/fixtures/abbreviations.json").read_text())
TASKS = {
    "text_to_image": TextToImage,
    "class_conditional": ClassConditional,
    "unconditional": Unconditional,
}
# The default of a flag is now said where it was put in before.
SAID = {"--timestep_sampler": (None, "uniform")}
CAME_LATER = {
    "--allow_config_change": ("imports", "adapter", "compile"),
    "--bad_samples": ("sample", "off"),
    "--formulation": ("mean_flow",),
}


@pytest.fixture(params=sorted(BEFORE))
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param in TASKS:
        return request.param, TASKS[request.param].command_line
    monkeypatch.syspath_prepend(ROOT / "examples" / "autoencoder")
    return request.param, importlib.import_module("vqgan_task").VQGAN.command_line


def test_every_abbreviation_resolves_as_before(script: tuple[str, CommandLine]) -> None:
    name, line = script
    parser, prefixes = line.parser(), BEFORE[name]["prefixes"]
    assert len(prefixes) > 100
    for prefix, flags in prefixes.items():
        told = parser.candidates(prefix)
        # one that was ambiguous stays so, where newer flags may join in
        assert (set(told) == set(flags)) if len(flags) == 1 else (set(told) >= set(flags)), prefix


def test_every_flag_has_the_type_default_and_choices_of_before(
    script: tuple[str, CommandLine],
) -> None:
    name, line = script
    now = {action.option_strings[-1]: action for action in line.parser()._actions}
    assert len(BEFORE[name]["flags"]) > 50
    for flag, before in BEFORE[name]["flags"].items():
        action = now[flag]
        default = list(action.default) if isinstance(action.default, tuple) else action.default
        if flag in SAID:
            assert (before["default"], default) in {SAID[flag], (SAID[flag][1], default)}
        else:
            assert default == before["default"], flag
        choices = [c for c in action.choices or () if c not in CAME_LATER.get(flag, ())]
        assert (choices or None) == before["choices"], flag
        assert action.nargs == before["nargs"], flag
        assert action.required == before["required"], flag
        assert type_of(action) == (before["type"] or "str"), flag


def type_of(action: argparse.Action) -> str:
    """The name of what turns a word into a value; a word as it is needs nothing."""
    return "str" if action.type is None else getattr(action.type, "__name__", str(action.type))
