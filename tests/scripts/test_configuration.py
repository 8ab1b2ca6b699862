"""Every script starts again from the run.yaml that it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from diffusers_curriculum.training.arguments.configuration import written
from diffusers_curriculum.training.loop.job import Job
from tests.scripts.every_script import SCRIPTS, Script

_RECIPES = {
    "text_to_image": ("--recipe", "min-snr"),
    "class_conditional": ("--recipe", "sd3", "--center_crop"),
}


def parsed(script: Script, *words: object, config: Path | None = None) -> dict[str, Any]:
    """The arguments with which it would train; those of ``config`` take the place of its own."""
    found: list[Any] = []
    own = [] if config is None else ["--config", str(config), *map(str, words)]
    argv = mock.Mock(return_value=own) if own else script.argv
    with (
        mock.patch.object(Job, "train", lambda job, *_, **__: found.append(job.args)),
        mock.patch.object(script, "argv", argv),
    ):
        script.main(*words)
    return vars(found[0])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_file_of_a_run_gives_its_arguments(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(name, tmp_path, monkeypatch)
    before = parsed(script, *_RECIPES.get(name, ()))
    file = tmp_path / "run.yaml"
    file.write_text(written(before["configuration"]))
    after = parsed(script, config=file)
    assert after.pop("config") == str(file)
    assert before.pop("config") is None
    assert after.pop("given") - {"config"} == before.pop("given")
    assert after == before


def test_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script("own_job", tmp_path, monkeypatch)
    script.main()
    first = {p.name: p.read_bytes() for p in script.output.glob("*.safetensors")}
    again = tmp_path / "again"
    words = ["--config", str(script.output / "run.yaml"), "--output_dir", str(again)]
    with mock.patch.object(script, "argv", return_value=words):
        script.main()
    assert first == {p.name: p.read_bytes() for p in again.glob("*.safetensors")}
    assert first
