"""`diffusers-curriculum verify` tells whole checkpoints from damaged ones, and by which file."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffusers_curriculum.cli import main
from diffusers_curriculum.training.checkpoint.checkpoints import find_checkpoint, save_checkpoint
from diffusers_curriculum.training.checkpoint.verify import inspect_run
from diffusers_curriculum.training.storage.manifest import versions
from tests.training.small_checkpoints import write

pytestmark = pytest.mark.reliability
BASE = {"_class_name": "X", "density": "laplace", "density_args": {"mu": 0, "b": 0.5}}
FILES = ["state.json", "unet/config.json", "unet/model.bytes"]


def save(root: Path, step: int, sampler: Any = BASE) -> Path:
    return save_checkpoint(root, step, write, {"sampler": sampler})


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def content(root: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (5, 10, 100):
        save(tmp_path, step)
    return tmp_path


def test_a_whole_run(run: Path, capsys: Any) -> None:
    before = content(run)
    assert main(["verify", str(run)]) == 0
    head, *rows, verdict = capsys.readouterr().out.splitlines()
    assert head.split() == ["checkpoint", "state", "step", "sampler", "torch", "diffusers"]
    wrote = versions()
    for row, step in zip(rows, ("5", "10", "100"), strict=True):
        cells = [cell.strip() for cell in row.split("  ") if cell]
        expected = [f"checkpoint-{step}", "whole", step, "laplace(b=0.5, mu=0)"]
        assert cells == [*expected, wrote["torch"], wrote["diffusers"]]
    assert verdict == "3 of 3 checkpoints whole; the newest is whole."
    assert content(run) == before


@pytest.mark.parametrize("damaged", FILES)
def test_a_damaged_newest_one(run: Path, capsys: Any, damaged: str) -> None:
    flip_bit(run / "checkpoint-100" / damaged)
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"checkpoint-100: {damaged} has another sha256" in out
    assert "2 of 3 checkpoints whole; THE NEWEST IS DAMAGED" in out
    assert "latest would resume from checkpoint-10." in out
    assert [r.whole for r in inspect_run(run)] == [True, True, False]
    assert find_checkpoint(run, "latest") == (run / "checkpoint-10").resolve()


def test_an_older_damaged_one_is_told_but_no_failure(run: Path, capsys: Any) -> None:
    (run / "checkpoint-5" / "state.json").unlink()
    os.truncate(run / "checkpoint-5" / "unet/config.json", 3)
    assert main(["verify", str(run)]) == 0
    out = capsys.readouterr().out
    assert "checkpoint-5: state.json is missing" in out
    assert "checkpoint-5: unet/config.json has 3 bytes instead of" in out
    assert out.count("damaged") == 1
    assert "2 of 3 checkpoints whole" in out


def test_every_file_and_every_kind_of_damage(tmp_path: Path) -> None:
    for name in [*FILES, "manifest.json"]:
        for damage in (flip_bit, os.unlink, lambda f: os.truncate(f, 0)):
            folder = save(tmp_path, 1)
            damage(folder / name)
            (report,) = inspect_run(tmp_path)
            assert not report.whole
            assert name in "".join(report.faults)
            shutil.rmtree(folder)


def test_without_any_whole_one(run: Path, capsys: Any) -> None:
    for folder in run.iterdir():
        flip_bit(folder / "manifest.json")
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert "0 of 3 checkpoints whole; THE NEWEST IS DAMAGED, none can be resumed." in out
    assert out.count("manifest.json is damaged") == 3


@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_no_checkpoints_is_bad_input(tmp_path: Path, capsys: Any, name: str) -> None:
    (tmp_path / "empty" / "checkpoint-best").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    assert main(["verify", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert str(tmp_path / name) in captured.err
    assert "--output_dir" in captured.err


def test_strangers_are_passed_over(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-best").mkdir()
    (run / ".tmp-checkpoint-200-1").mkdir()
    os.symlink(run / "checkpoint-5", run / "checkpoint-300")
    assert [report.step for report in inspect_run(run)] == [5, 10, 100]


def test_the_table_fits_100_columns(tmp_path: Path, capsys: Any) -> None:
    wide = {"density": "a_density_of_a_long_name", "density_args": {f"p{i}": i for i in range(40)}}
    save(tmp_path, 1, {"_class_name": "CurriculumTimestepSampler", "clusters": 20, "base": wide})
    save(tmp_path, 123456789012)
    main(["verify", str(tmp_path)])
    table = capsys.readouterr().out.splitlines()[:-1]
    assert max(map(len, table)) == 100
    assert re.search(r" a_density_of_a_long_name\(p0=.*\.\.\. ", table[1])
    assert str(versions()["diffusers"]) in table[1]


def test_a_checkpoint_that_tells_no_sampler(tmp_path: Path, capsys: Any) -> None:
    save_checkpoint(tmp_path, 4, write, {"world_size": 1})
    assert main(["verify", str(tmp_path)]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:4] == ["checkpoint-4", "whole", "4", "-"]
