"""`diffusers-curriculum train`: every training script by a short name."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum.cli import main
from diffusers_curriculum.cli.train import SCRIPTS, script_file

ROOT = Path(__file__).parents[1]


def test_every_script_has_a_name() -> None:
    found = {*ROOT.glob("train_*.py"), *ROOT.glob("examples/*/train_*.py")}
    assert {script_file(kind) for kind in SCRIPTS} == found


def test_what_follows_the_name_is_the_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: ran.append((path, run_name)))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["x"])
    assert main(["train", "class", "--model_config", "DiT-S/2", "--use_ema"]) == 0
    file = str(script_file("class"))
    assert ran == [(file, "__main__")]
    assert sys.argv == [file, "--model_config", "DiT-S/2", "--use_ema"]
    assert sys.path[0] == str(Path(file).parent)
    assert capsys.readouterr().out == ""


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "dreambooth"])
    assert ended.value.code == 2
    assert "choose from" in capsys.readouterr().err
