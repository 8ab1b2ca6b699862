"""Which checkpoints are deleted, which stay, and what a crash leaves."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum.training.checkpoint.checkpoints import find_checkpoint
from diffusers_curriculum.training.storage.folders import checkpoints, clean_temporary
from diffusers_curriculum.training.storage.manifest import verify_checkpoint
from tests.training.small_checkpoints import names, save


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10, 100, 9):
        save(tmp_path, step)
    save(tmp_path, 101, limit=3)
    assert [f.name for f in checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-100",
        "checkpoint-101",
    ]


def make_strangers(root: Path) -> list[Path]:
    outside = save(root / "elsewhere", 1)
    (root / "checkpoint-0").symlink_to(outside)
    (root / "checkpoint-1").write_text("a file")
    for name in (
        "checkpoint-best",
        "checkpoint-",
        "checkpoint-1x",
        "xcheckpoint-1",
        "checkpoint-01",
    ):
        save(root / "elsewhere", 1).rename(root / name)
    save(root / "elsewhere", 1)
    (root / ".tmp-other").mkdir()
    (root / ".tmp-checkpoint-1-7").symlink_to(outside)
    (root / "logs").mkdir()
    return sorted(root.iterdir())


def test_rotation_and_cleaning_ignore_strangers(tmp_path: Path) -> None:
    strangers = make_strangers(tmp_path)
    for step in (2, 3, 4):
        save(tmp_path, step, limit=1)
    clean_temporary(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*strangers, tmp_path / "checkpoint-4"])
    verify_checkpoint(tmp_path / "elsewhere" / "checkpoint-1")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-4"


def test_a_later_whole_checkpoint_survives_a_run_repeated_from_an_earlier_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 6, 8):
        save(tmp_path, step)
    save(tmp_path, 4, limit=1)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    assert "Kept" in caplog.text


def test_a_later_damaged_checkpoint_goes(tmp_path: Path) -> None:
    (save(tmp_path, 8) / "state.json").write_text("?")
    save(tmp_path, 4, limit=1)
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EBUSY, "busy")

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        save(tmp_path, 2, limit=1)
    assert "Could not delete" in caplog.text
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-2"]
    clean_temporary(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]


def test_cleaning_removes_what_was_half_written_and_restores_what_was_moved_aside(
    tmp_path: Path,
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".old-checkpoint-1-77")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / ".old-checkpoint-2-77")
    (tmp_path / ".tmp-checkpoint-1-77" / "unet").mkdir(parents=True)
    (tmp_path / ".tmp-checkpoint-2-78").mkdir()
    clean_temporary(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    verify_checkpoint(tmp_path / "checkpoint-1")
    clean_temporary(tmp_path / "absent")
