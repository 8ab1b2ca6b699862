"""The flags of diffusers' LoRA scripts for SD3, Flux, Flux.2 klein, Qwen-Image and Z-Image:
accepted with the same type and default, or listed in docs/differences.md with the reason."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.flag import truth
from diffusers_curriculum.training.tasks.flow import FlowTransformer
from diffusers_curriculum.training.tasks.flow_lora import flow_task

ROOT = Path(__file__).parents[3]
FIXTURE = ROOT / "tests" / "fixtures" / "official_flow_flags.json"
SCRIPTS: dict[str, Any] = {
    name: facts for name, facts in json.loads(FIXTURE.read_text()).items() if name != "source"
}
TYPES = {"int": int, "float": float, "str": str, "bool": truth, None: None}
FACTS = [(name, fact) for name, facts in SCRIPTS.items() for fact in facts]


def actions() -> dict[str, argparse.Action]:
    parser = FlowTransformer.command_line.parser()
    return {action.option_strings[-1]: action for action in parser._actions}


def listed(heading: str) -> set[str]:
    """Flags in the first column of a table of docs/differences.md that give a reason."""
    text = (ROOT / "docs" / "differences.md").read_text()
    rows = text.split(f"### {heading}\n")[1].split("\n#")[0].splitlines()
    told = [row.strip("|").split("|") for row in rows if row.startswith("| `")]
    assert all(cells[-1].strip() for cells in told)
    return {flag for cells in told for flag in re.findall(r"`(--\w+)", cells[0])}


def test_the_fixture_holds_the_official_flags() -> None:
    assert [len({fact["flag"] for fact in facts}) for facts in SCRIPTS.values()] == [
        *(75, 76, 85, 79, 83)
    ]


@pytest.mark.parametrize(
    ("script", "fact"), FACTS, ids=lambda x: x if isinstance(x, str) else x["flag"]
)
def test_an_official_flag_is_kept_or_listed(script: str, fact: dict[str, Any]) -> None:
    flag, action = fact["flag"], actions().get(fact["flag"])
    if action is None:
        assert flag in listed("Flags that are not taken")
        return
    is_switch = isinstance(action, argparse._StoreTrueAction)
    assert is_switch == (fact["action"] == "store_true")
    same = (action.default, action.required) == (fact["default"], fact["required"])
    assert same or flag in listed("Defaults that differ"), action.default
    if not is_switch:
        assert action.type is TYPES[fact["type"]] or flag in listed("Defaults that differ")
        assert action.nargs == fact["nargs"]
        assert {*(fact["choices"] or ())} <= {*(action.choices or ())}


def test_nothing_is_listed_that_is_as_in_diffusers() -> None:
    known, ours = {fact["flag"] for _, fact in FACTS}, actions()
    assert listed("Flags that are not taken") == known - ours.keys()
    differing = {
        fact["flag"]
        for _, fact in FACTS
        if fact["flag"] in ours
        and (ours[fact["flag"]].default, ours[fact["flag"]].required)
        != (fact["default"], fact["required"])
    }
    assert listed("Defaults that differ") == differing


def parsed(*words: str) -> Arguments:
    """What a command line of the flow script says, without a look at the machine."""
    argv = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "images", *words]
    return flow_task(argv).parse(argv, machine=False)


def test_an_unknown_scheme_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--weighting_scheme", "logitnormal")
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "--weighting_scheme" in told
    assert "'logitnormal'" in told
    assert "logit_normal" in told
