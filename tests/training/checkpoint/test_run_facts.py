"""The facts of a run, by which checkpoints of earlier versions are known, do not change unnoticed.

tests/fixtures/run_facts.json was recorded in November 2026, before flags were declared in one
place. A run that goes on from such a checkpoint has those facts; what was chosen by a default that
has changed since is named in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from diffusers_curriculum.training.loop import job
from diffusers_curriculum.training.storage.fingerprints import hash_config
from tests.reliability.test_checkpoints_of_scripts import FIXTURES, _script
from tests.scripts.small_runs import reset_accelerate
from tests.training.older_facts import told_today

RECORD = json.loads((FIXTURES.parent / "run_facts.json").read_text())["scripts"]
CASES = [(script, name) for script, cases in RECORD.items() for name in cases]


class _Told(Exception):
    """The facts are known: the run need not go on."""


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


def test_there_is_a_record_of_every_script() -> None:
    assert set(RECORD) == {"text_to_image", "class_conditional", "unconditional", "vit_vqgan"}
    assert len(CASES) > 40


@pytest.mark.parametrize(("script", "case"), CASES, ids=lambda value: value)
def test_facts_are_those_of_the_record(
    script: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script == "text_to_image":
        pytest.importorskip("transformers", minversion="5")  # which saved its pipeline
    recorded, told = RECORD[script][case], []

    def check_same_run(facts: dict[str, Any], *unused: Any) -> None:
        told.append(facts)
        raise _Told

    paths = {
        "{pipeline}": FIXTURES / script / "pipeline",
        "{images}": FIXTURES / script / "images",
        "{checkpoints}": FIXTURES,
        "{cache}": tmp_path / "cache",
        "{output}": tmp_path / "output",
    }
    argv = recorded["argv"]
    for placeholder, path in paths.items():
        argv = [word.replace(placeholder, str(path)) for word in argv]
    if "--resume_from_checkpoint" not in argv:
        argv = [*argv, "--resume_from_checkpoint", "latest"]
    resumed: dict[str, Any] = {
        "find_checkpoint": lambda *unused: tmp_path,
        "read_manifest": lambda *unused: {"facts": recorded["facts"]},
    }
    with mock.patch.multiple(job, check_same_run=check_same_run, **resumed), pytest.raises(_Told):
        _script(script, monkeypatch).main(argv)
    expected = told_today(recorded["facts"])
    assert told[0] == expected
    if expected.get("sampler") == recorded["facts"].get("sampler"):
        del told[0]["imports"], told[0]["compile"]
        assert hash_config(told[0]) == recorded["sha256"]
