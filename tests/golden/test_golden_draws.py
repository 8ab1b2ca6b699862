"""Same seed, same draws, in every later version; and the file that says so is only added to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tests.golden import record
from tests.golden.configurations import BATCH, SEED, SHOWN, STEPS, Draws, configurations, draw

CASES = configurations()
RECORDED = record.read()


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_first_thousand_draws_are_those_recorded(name: str) -> None:
    if name not in RECORDED:
        pytest.fail(f"{name} is new: run python -m tests.golden.record")
    drawn = draw(CASES[name])
    assert drawn.first == RECORDED[name].first, record.WHAT_TO_DO
    assert drawn.sha256 == RECORDED[name].sha256, record.WHAT_TO_DO


def test_nothing_recorded_is_gone() -> None:
    assert sorted(RECORDED.keys() - CASES.keys()) == []


def test_a_digest_is_of_a_thousand_indices() -> None:
    """Uniform over 1,000 timesteps: the levels are the numbers of the published construction."""
    indices = []
    for step in range(STEPS):
        key = hashlib.blake2b(repr(("timestep", SEED, step)).encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        u = (rng.permutation(BATCH) + rng.random(BATCH)) / BATCH
        indices += np.floor(u * 1000).astype(int).tolist()
    assert len(indices) == 1000
    content = b"".join(index.to_bytes(8, "little") for index in indices)
    recorded = RECORDED["density/uniform"]
    assert recorded == Draws(hashlib.sha256(content).hexdigest(), indices[:SHOWN])


# -- the record ------------------------------------------------------------------------------------

A, B, C = (Draws(letter * 64, [1, 2, 3]) for letter in "abc")


def test_new_entries_are_added_and_old_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "draws.json"
    assert record.record({"b": B}, path) == (["b"], [])
    before = path.read_text().splitlines()
    assert record.record({"a": A, "b": B}, path) == (["a"], [])
    assert record.read(path) == {"a": A, "b": B}
    assert before[1] in path.read_text().splitlines()
    written = path.read_bytes()
    assert record.record({"a": A, "b": B}, path) == ([], [])
    assert path.read_bytes() == written


@pytest.mark.parametrize("other", [B._replace(sha256="f" * 64), B._replace(first=[1, 2, 4])])
def test_a_changed_entry_is_refused_and_nothing_is_written(other: Draws, tmp_path: Path) -> None:
    path = tmp_path / "draws.json"
    record.record({"b": B}, path)
    written = path.read_bytes()
    assert record.record({"b": other, "c": C}, path) == (["c"], ["b"])
    assert path.read_bytes() == written


def test_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = {"a": A}
    monkeypatch.setattr(record, "FILE", tmp_path / "draws.json")
    monkeypatch.setattr(record, "configurations", lambda: drawn)
    monkeypatch.setattr(record, "draw", lambda case: case)
    assert record.main() == 0
    assert "1 new: a" in capsys.readouterr().out
    drawn["a"] = B
    assert record.main() == 1
    assert "a change of numbers needs a changelog heading" in capsys.readouterr().out
    assert record.read(record.FILE) == {"a": A}
