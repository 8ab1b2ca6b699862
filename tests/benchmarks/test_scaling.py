"""How costs grow, in the smallest form: every axis has rows, and what must not grow may not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import ranks
from benchmarks.scaling.parts import SIZES, Part, parts
from benchmarks.scaling.rows import Row, growth, measure
from diffusers_curriculum import Slots


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """The command sets the number of threads and the log level of this process."""
    threads, logger = torch.get_num_threads(), logging.getLogger("diffusers_curriculum")
    level = logger.level
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


def test_every_part_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, axes = tmp_path / "figures.json", [axis for axis in SIZES if axis != "ranks"]
    quick = ["--largest", "1000", "--repeats", "1", "--blocks", "1", "--axes", *axes]
    assert scaling.main([*quick, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    names = [(row["axis"], row["name"]) for row in figures["rows"]]
    assert names == [(part.axis, part.name) for part in parts()]
    assert {axis for axis, _ in names} == set(axes)
    for row in figures["rows"]:
        assert len(row["sizes"]) == len(row["microseconds"]) == len(row["memory"]) >= 1
        assert all(time > 0 for time in row["microseconds"])
    printed = capsys.readouterr().out
    assert all(name in printed for _, name in names)


def test_the_exponent_is_that_of_a_power() -> None:
    assert growth([10, 100, 1000], [3.0, 3.0, 3.0]) == 0
    assert growth([10, 100, 1000], [2e1, 2e3, 2e5]) == 2
    assert growth([10], [5.0]) == 0


def test_memory_is_that_of_what_is_kept() -> None:
    kept: list[torch.Tensor] = []
    part = Part("rows", "list", lambda n: lambda: kept.append(torch.zeros(n)), heavy=True)
    row = measure(part, [1, 1_000_000], 1, 1)
    assert row.memory[0] < 100_000
    assert 4_000_000 <= row.memory[1] < 4_100_000


def test_what_must_not_grow_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(grown: float, must: bool) -> Row:
        return Row("timesteps", "draw", [1, 2], [1.0, 1.0], [0, 0], grown, grown, must)

    for rows, agree, status in (
        ([row(0.1, True), row(0.9, False)], {"2": True}, 0),
        ([row(0.11, True)], {}, 1),
        ([], {"2": True, "1024": False}, 1),
    ):
        monkeypatch.setattr(scaling, "run", lambda _, found=(rows, agree): found)
        assert scaling.main(["--check"]) == status
        assert scaling.main([]) == 0
    told = capsys.readouterr().out
    assert "failed: draw grows with the timesteps to the power 0.11" in told
    assert "failed: 1024 ranks do not draw what one does" in told


def test_ranks_together_draw_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.measure_ranks((1, 5), 1, 1)[1] == {"1": True, "5": True}
    of = Slots.of
    monkeypatch.setattr(Slots, "of", lambda size, rank=0, **more: of(size, rank=rank // 2, **more))
    assert ranks.measure_ranks((1, 5), 1, 1)[1] == {"1": True, "5": False}


@pytest.mark.slow
def test_real_ranks_draw_what_one_does() -> None:
    assert ranks.measure_ranks((ranks.REAL,), 1, 1)[1] == {str(ranks.REAL): True}
