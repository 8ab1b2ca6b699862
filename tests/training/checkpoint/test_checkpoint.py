"""Saving a checkpoint, running out of disk space, and finding the one to resume from."""

from __future__ import annotations

import errno
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.checkpoint.checkpoints import (
    find_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from diffusers_curriculum.training.errors import CheckpointError, DiskFullError, UsageError
from diffusers_curriculum.training.storage.manifest import MANIFEST
from diffusers_curriculum.training.storage.tensors import save_tensors
from tests.training.small_checkpoints import content_of, names, save, write


def test_a_saved_checkpoint_verifies_and_says_what_it_is(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    manifest = verify_checkpoint(folder)
    assert folder == tmp_path / "checkpoint-7"
    assert names(tmp_path) == ["checkpoint-7"]
    assert manifest["step"] == 7
    assert manifest["facts"] == {"world_size": 1}
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert sorted(manifest["files"]) == ["state.json", "unet/config.json", "unet/model.bytes"]


def test_saving_the_same_step_again_replaces_the_folder(tmp_path: Path) -> None:
    save(tmp_path, 3, content="first")
    (tmp_path / "checkpoint-3" / "left.over").touch()
    folder = save(tmp_path, 3, content="second")
    verify_checkpoint(folder)
    assert content_of(folder) == "second"
    assert not (folder / "left.over").exists()
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize(
    "facts", [{"loss": float("nan")}, {"path": Path("x")}, {"x": {1: 2, "a": 3}}]
)
def test_facts_that_json_cannot_hold_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="facts="):
        save_checkpoint(tmp_path, 1, write, facts)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("step", "limit"), [(1, 0), (1, -2), (-1, None)])
def test_bad_numbers_are_refused_before_anything_is_written(
    tmp_path: Path, step: int, limit: int | None
) -> None:
    with pytest.raises(UsageError, match=r"step=-1|total_limit="):
        save(tmp_path, step, limit)
    assert names(tmp_path) == []


def test_a_name_taken_by_a_link_or_file_is_refused(tmp_path: Path) -> None:
    other = save(tmp_path / "other", 1)
    (tmp_path / "checkpoint-1").symlink_to(other)
    (tmp_path / "checkpoint-2").write_text("mine")
    for step in (1, 2):
        with pytest.raises(CheckpointError, match=f"checkpoint-{step} exists and is not a folder"):
            save(tmp_path, step)
    assert content_of(other) == "weights"
    assert (tmp_path / "checkpoint-2").read_text() == "mine"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_plainly(folder: Path) -> None:
    (folder / "state.bytes").write_bytes(bytes(200_000))


def no_space(folder: Path) -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


def write_safetensors(folder: Path) -> None:
    save_tensors(folder / "x.safetensors", {"x": torch.zeros(50_000)})


@pytest.mark.reliability
@pytest.mark.parametrize("fill", [write_plainly, write_safetensors])
def test_disk_full(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    """A real failure of the system; safetensors reports it as no OSError at all."""
    old = save(tmp_path, 1)
    with file_size_limit(100_000), pytest.raises(DiskFullError) as caught:
        save_checkpoint(tmp_path, 2, fill, {}, 1, bytes_needed=200_000)
    message = str(caught.value)
    assert "checkpoint-2" in message
    assert "200,000 bytes" in message
    assert f"{caught.value.free:,} are free" in message
    assert "--checkpoints_total_limit" in message
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["checkpoint-1"]
    verify_checkpoint(old)


def test_bytes_needed_are_estimated_from_an_older_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write_plainly, {})
    with pytest.raises(DiskFullError) as caught:
        save_checkpoint(tmp_path, 2, no_space, {})
    assert 200_000 < caught.value.needed < 202_000


def test_too_little_space_is_noticed_before_writing(tmp_path: Path) -> None:
    written: list[Path] = []
    with pytest.raises(DiskFullError, match="before writing"):
        save_checkpoint(tmp_path, 2, written.append, {}, bytes_needed=10**18)
    assert written == []
    assert names(tmp_path) == []


def test_other_errors_pass_unchanged_and_leave_nothing(tmp_path: Path) -> None:
    def denied(folder: Path) -> None:
        write(folder)
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        save_checkpoint(tmp_path, 1, denied, {})
    assert names(tmp_path) == []


def test_latest_is_the_newest_by_number(tmp_path: Path) -> None:
    for step in (10, 9):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"


def test_latest_falls_back_with_a_warning_that_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3/unet/model.bytes").write_text("?")
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2").mkdir()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 2
    assert "checkpoint-3" in warned[0]
    assert "unet/model.bytes" in warned[0]
    assert "checkpoint-2" in warned[1]
    assert MANIFEST in warned[1]


def test_latest_without_any_is_none_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert find_checkpoint(tmp_path / "new", "latest") is None
    assert "starting from the beginning" in caplog.text
    assert not (tmp_path / "new").exists()


def test_a_path_is_literal_and_a_bare_name_is_inside(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    inside, outside = save(run, 1), save(other, 1)
    (run / "link").symlink_to(outside)
    assert find_checkpoint(run, "checkpoint-1") == inside
    assert find_checkpoint(run, str(outside)) == outside
    assert find_checkpoint(run, f"{run}/../other/checkpoint-1") == outside
    assert find_checkpoint(run, "link") == outside


def test_a_relative_path_is_not_looked_up_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run", 1)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("run", "run/checkpoint-1") == tmp_path / "run/checkpoint-1"
    with pytest.raises(CheckpointError, match=f"no folder {tmp_path}/checkpoint-1"):
        find_checkpoint("run", "./checkpoint-1")


def test_an_explicit_one_never_falls_back(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoint-2/state.json").write_text("?")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        find_checkpoint(tmp_path, "checkpoint-2")
    with pytest.raises(CheckpointError, match=f"no folder {tmp_path}/checkpoint-3"):
        find_checkpoint(tmp_path, "checkpoint-3")


def test_a_folder_without_manifest_is_a_clear_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(CheckpointError, match=f"checkpoint-best has no {MANIFEST}"):
        find_checkpoint(tmp_path, "checkpoint-best")
