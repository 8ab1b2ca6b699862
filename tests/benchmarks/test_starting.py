"""The start on very many images, in a tiny form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import starting
from diffusers_curriculum.training.data.sources import load_images


@pytest.mark.parametrize("kind", starting.KINDS)
def test_every_row_is_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "SHARD", 3)
    shards = starting.write_shards(kind, 7, tmp_path / "shards")
    cache = str(tmp_path / "cache")
    rows = load_images(str(shards), caption_column="text", cache_dir=cache, streaming=True)
    assert list(rows["text"]) == [f"caption of row {number}" for number in range(7)]


def test_a_missed_bar_is_told() -> None:
    good, slow = {"seconds": 9.0, "gib": 1.0}, {"seconds": 31.0, "gib": 1.0}
    found = {"rows": 9, "tar": {"first": slow, "again": good}, "parquet": {"again": slow}}
    assert starting.faults(found) == ["parquet, again: 31.0 s, 1.0 GiB"]


@pytest.mark.slow
def test_a_start_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rows", "40", "--kinds", "parquet", "--json", str(tmp_path / "found.json")]
    assert starting.main(words) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["parquet"]["again"]["gib"] > 0.1
    assert json.loads(capsys.readouterr().out) == found
