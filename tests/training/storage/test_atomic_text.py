"""A text file is whole or not there, and what a kill leaves beside it is cleared up."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from diffusers_curriculum.training.storage import files
from diffusers_curriculum.training.storage.files import remove_half_written, write_atomically
from diffusers_curriculum.training.storage.folders import clean_temporary


def killed_while_writing(path: Path) -> None:
    """Write in a process that is killed before the new file gets its name."""
    child = os.fork()
    if not child:
        files.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(path, "new")
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("name", ["run.json", "bad_samples.jsonl"])
def test_a_kill_leaves_the_old_file_and_its_rest_goes_at_the_next_start(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    write_atomically(path, "old")
    killed_while_writing(path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    clean_temporary(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.json"
    write_atomically(path, "old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_others_stay(tmp_path: Path) -> None:
    others = (".tmp-run.json", ".tmp-notes.txt-12", "tmp-run.json-12", ".tmp-run.json-1x")
    for name in (*others, "run.json"):
        (tmp_path / name).write_text("")
    (tmp_path / ".tmp-run.json-77").symlink_to(tmp_path / "run.json")
    (tmp_path / ".tmp-run.json-78").mkdir()
    before = sorted(tmp_path.iterdir())
    remove_half_written(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    remove_half_written(tmp_path / "absent")
