"""A checkpoint of every released version is still gone on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.reliability.make_fixture import EVERYTHING, FIXTURES, STEPS, STOPPED
from tests.scripts.small_runs import Bench, train

VERSIONS = sorted(folder.name for folder in FIXTURES.iterdir())


def test_there_is_one_of_the_first_version() -> None:
    assert "0.1.0" in VERSIONS


@pytest.mark.reliability
@pytest.mark.parametrize("version", VERSIONS)
def test_old_checkpoint_still_resumes(version: str, tmp_path: Path) -> None:
    """Same draws to the last bit, same losses as far as processors agree."""
    pytest.importorskip("transformers", minversion="5")  # which saved the pipelines
    old = FIXTURES / version
    expected = json.loads((old / "expected.json").read_text())
    assert sum(file.stat().st_size for file in old.rglob("*") if file.is_file()) < 2**20
    run = tmp_path / "run"
    shutil.copytree(old / f"checkpoint-{STOPPED}", run / f"checkpoint-{STOPPED}")
    bench = Bench(old / "pipeline", old / "images", tmp_path / "cache")
    argv = bench.argv(run, *EVERYTHING, "--resume_from_checkpoint", "latest")
    record = train(argv)
    assert record.numbers == list(range(STOPPED, STEPS))
    assert [list(step.indices) for step in record.steps] == [step["indices"] for step in expected]
    for step, wanted in zip(record.steps, expected, strict=True):
        assert float.fromhex(step.loss) == pytest.approx(wanted["loss"], rel=1e-4)
        assert step.lr == wanted["lr"]
