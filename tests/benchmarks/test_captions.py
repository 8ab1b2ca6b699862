"""The timing of text encoders, in a tiny form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import captions


def test_each_family_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--captions", "2", "--at_once", "1", "2", "--repeats", "1", "--families", "sd3"]
    assert captions.main([*quick, "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"sd3"}
    assert figures["sd3"].keys() == {"1", "2"}
    assert all(rate > 0 for rate in figures["sd3"].values())
    assert "(1.00x)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen_image", "flux2"])
def test_encoders_are_as_wide_as_told(name: str) -> None:
    encoders = captions.models_of(captions.families()[name]).encoders.values()
    assert all(captions.WIDTH in {max(p.shape) for p in e.parameters()} for e in encoders)
