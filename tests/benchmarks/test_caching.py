"""The timing of latent caches, in a tiny form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import caching

QUICK = ["--images", "20", "--side", "64", "--rows", "40"]


def test_the_parts_make_up_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert caching.main([*QUICK, "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["decoding"] > 0.01
    assert figures["encoding"] > 0.1
    assert figures["decoding"] + figures["encoding"] + figures["rest"] == pytest.approx(1)
    assert (figures["images"], figures["rows"]) == (20, 40)
    assert figures["again"] < figures["seconds"]  # nothing was encoded again
    assert "20 JPEGs of 64 pixels" in capsys.readouterr().out


def test_a_missed_bar_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(caching, "SHARE", 1.0)
    monkeypatch.setattr(caching, "SECONDS", {"again": 100.0, "again_many": 0.0})
    assert caching.main([*QUICK, "--check"]) == 1
    assert "missed: again_many, rest" in capsys.readouterr().err
