"""A base that is moved or deleted while a run goes on is whole in what the run leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_curriculum.training.loop import job
from tests.scripts.every_script import FIXTURES, Script

# script, flag and folder of what it begins with; the frozen parts that the pipeline takes over
BASES = (
    ("text_to_image", "--pretrained_model_name_or_path", "", ("vae", "text_encoder", "tokenizer")),
    ("class_conditional", "--pretrained_vae_model_name_or_path", "vae", ("vae",)),
)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.reliability
@pytest.mark.parametrize(("name", "flag", "folder", "parts"), BASES)
def test_what_is_left_is_whole_though_its_base_has_gone(
    name: str,
    flag: str,
    folder: str,
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    original = FIXTURES / name / "pipeline" / folder
    base = Path(shutil.copytree(original, tmp_path / "base"))
    make_update = job.make_update

    def vanishing(*args: Any) -> Any:
        shutil.rmtree(base, ignore_errors=True)
        return make_update(*args)

    script = Script(name, tmp_path, monkeypatch)
    with mock.patch.object(job, "make_update", vanishing):
        script.main(flag, base, "--max_train_steps", 1, "--curriculum_max_share", "inf")
    assert not base.exists()
    for part in parts:
        assert contents(script.output / part) == contents(
            original / part if not folder else original
        )
    DiffusionPipeline.from_pretrained(script.output, trust_remote_code=True)
