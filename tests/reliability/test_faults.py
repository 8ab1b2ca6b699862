"""Faults in the middle of a run, for every training script: what it says, and what it leaves."""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffusers_curriculum.training.loop import job as jobs
from diffusers_curriculum.training.loop import saving
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.storage.manifest import verify_checkpoint
from tests.scripts.small_runs import Bench, checkpoint_names, hashes, status, train

pytestmark = pytest.mark.reliability

STEPS = 6
EVERYTHING = (
    *("--max_train_steps", STEPS, "--use_ema", "--checkpointing_steps", 2, "--log_every", 1),
    *("--curriculum", "difficulty", "--curriculum_clusters", 2, "--curriculum_patience", 1),
    *("--curriculum_max_share", 1, "--checkpoints_total_limit", 1),
)
LATEST = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The last checkpoint of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert status(bench.argv(folder, *EVERYTHING), bench.script) == 0
    return hashes(folder / f"checkpoint-{STEPS}")


def hidden(folder: Path) -> list[str]:
    """What an interrupted save would leave."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: the system itself refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def from_step(bench: Bench, number: int, make: Any) -> Iterator[None]:
    """Replace the training step from this optimizer step on."""
    step = bench.module.training_step

    def replaced(run: Any, at: int, *args: Any) -> Any:
        return (make if at >= number else step)(run, at, *args)

    with mock.patch.object(bench.module, "training_step", replaced):
        yield


def allocate(*args: Any) -> None:
    """Fail as a device does."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.thinned(2)
# the thread of tensorboard's writer may meet the limit, too
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_disk_full(
    bench: Bench, whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = bench.argv(tmp_path, *EVERYTHING, *LATEST)
    with from_step(bench, 3, allocate):
        assert status(argv, bench.script) == 2
    capsys.readouterr()
    tensors = (tmp_path / "checkpoint-2").rglob("*.safetensors")  # of one size at every step
    largest = max(file.stat().st_size for file in tensors)
    with file_size_limit(largest - 1):
        assert status(argv, bench.script) == 4
    told = capsys.readouterr().err
    numbers = re.findall(r"([\d,]{6,})(?= bytes| are)", told)
    needed, free = (int(number.replace(",", "")) for number in numbers)
    assert largest < needed < 10 * largest
    assert free <= shutil.disk_usage(tmp_path).total
    assert "checkpoint-4" in told
    assert checkpoint_names(tmp_path) == {"checkpoint-2"}
    verify_checkpoint(tmp_path / "checkpoint-2")
    assert status(argv, bench.script) == 0
    assert hashes(tmp_path / f"checkpoint-{STEPS}") == whole
    assert hidden(tmp_path) == []


@pytest.mark.thinned(2)
def test_out_of_memory(
    bench: Bench, whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = bench.argv(tmp_path, *EVERYTHING, *LATEST)
    with from_step(bench, 3, allocate):
        assert status(argv, bench.script) == 2
    told = capsys.readouterr().err
    assert "--train_batch_size 2," in told
    side = [value for flag, value in pairwise(argv) if flag == "--resolution"][-1]
    assert f"--resolution {side}," in told
    assert told.count("\n  - ") >= 3
    assert checkpoint_names(tmp_path) == {"checkpoint-2"}
    assert status(argv, bench.script) == 0
    assert hashes(tmp_path / f"checkpoint-{STEPS}") == whole


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with (
        mock.patch.object(runtime.tempfile, "TemporaryFile", denied),
        mock.patch.object(jobs, "training_batches", side_effect=Resumed),
    ):
        assert status(bench.argv(tmp_path, *EVERYTHING), bench.script) == 2
    told = capsys.readouterr().err
    assert f"--output_dir {tmp_path} cannot be written: Read-only file system" in told
    assert "give another folder" in told


@pytest.mark.thinned(3)
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_read_only_in_the_middle_of_a_run(
    bench: Bench,
    whole: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    save = saving.save_checkpoint

    def later_denied(folder: Any, step: int, *args: Any, **kwargs: Any) -> Any:
        if step > 2:
            raise OSError(number, os.strerror(number))
        return save(folder, step, *args, **kwargs)

    argv = bench.argv(tmp_path, *EVERYTHING, *LATEST)
    with mock.patch.object(saving, "save_checkpoint", later_denied):
        assert status(argv, bench.script) == 2
    told = capsys.readouterr().err
    assert f"checkpoint-4 could not be written to {tmp_path}: {os.strerror(number)}" in told
    assert "--resume_from_checkpoint latest" in told
    verify_checkpoint(tmp_path / "checkpoint-2")
    assert status(argv, bench.script) == 0
    assert hashes(tmp_path / f"checkpoint-{STEPS}") == whole


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_is_never_saved(bench: Bench, tmp_path: Path, value: float) -> None:
    def spoilt(run: Any, at: int, *args: Any) -> Any:
        parameter = next(p for p in run.optimizer.param_groups[0]["params"])
        result = step(run, at, *args)
        parameter.grad.view(-1)[0] = value
        return result

    step = bench.module.training_step
    with from_step(bench, 2, spoilt):
        argv = bench.argv(tmp_path, *EVERYTHING)
        assert status(argv, bench.script) == 3
    assert checkpoint_names(tmp_path) == {"checkpoint-2"}
    verify_checkpoint(tmp_path / "checkpoint-2")
    assert not (tmp_path / bench.index).exists()


@pytest.fixture(scope="module")
def two_checkpoints(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    more = ("--max_train_steps", 4, "--checkpoints_total_limit", 2)
    assert status(bench.argv(folder, *EVERYTHING, *more), bench.script) == 0
    assert checkpoint_names(folder) == {"checkpoint-2", "checkpoint-4"}
    return folder


@pytest.mark.thinned(2)
def test_missing_component_is_error(
    bench: Bench,
    two_checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whichever file is gone: an explicit checkpoint is refused, `latest` takes the one before."""
    files = sorted(p for p in (two_checkpoints / "checkpoint-4").rglob("*") if p.is_file())
    assert len(files) >= 6
    for number, file in enumerate(files):
        run = tmp_path / str(number)
        shutil.copytree(two_checkpoints, run)
        missing = run / file.relative_to(two_checkpoints)
        missing.unlink()
        argv = bench.argv(run, *EVERYTHING, "--resume_from_checkpoint")
        before = hashes(run / "checkpoint-2")
        assert status([*argv, "checkpoint-4"], bench.script) == 2
        assert str(missing.relative_to(run / "checkpoint-4")) in capsys.readouterr().err
        with (
            mock.patch.object(jobs, "training_batches", side_effect=Resumed),
            pytest.raises(Resumed),
            caplog.at_level(logging.WARNING),
        ):
            train([*argv, "latest"], script=bench.script)
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert any("checkpoint-4" in text and missing.name in text for text in warned)
        assert hashes(run / "checkpoint-2") == before
        caplog.clear()


class Resumed(Exception):
    """The state was read, and training would begin."""
