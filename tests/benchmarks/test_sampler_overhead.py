"""The timing of samplers, in a tiny form: that every entry has a row and that limits are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import sampler_overhead as overhead
from diffusers_curriculum import TimestepSampler
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.pacing import PACINGS
from diffusers_curriculum.randomness import DRAWS
from tests.floors_fixtures import table

QUICK = ["--batch", "4", "--repeats", "1", "--blocks", "1"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The command sets the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_entry_of_every_registry_has_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert overhead.main([*QUICK, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["left_out"] == {}
    rows = {row["name"]: row for row in figures["rows"]}
    expected = {f"density {name}" for name in DENSITIES} | {f"draw {name}" for name in DRAWS}
    expected |= {f"curriculum, pacing {name}" for name in PACINGS}
    expected |= {f"sampler {name}" for name in overhead.own_samplers()}
    assert expected <= rows.keys()
    assert len(rows) == len(figures["rows"])
    assert all(value > 0 for row in rows.values() for value in row.values() if value != row["name"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_an_entry_that_cannot_be_built_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> TimestepSampler:
        raise ValueError("needs points")

    monkeypatch.setattr(overhead, "cases", lambda: [("density new", refuse)])
    rows, left_out = overhead.run(4, 1, 1)
    assert (rows, left_out) == ([], {"density new": "needs points"})
    assert "left out: density new: needs points" in overhead.table(rows, left_out)


class Slow(TimestepSampler):
    """Takes 3 milliseconds for a draw and 1 for an observation."""

    def __init__(self) -> None:
        super().__init__(table([1.0, 0.0, -1.0]))

    def law(self, step: int, device: torch.device) -> torch.Tensor:
        return torch.full((3,), 1 / 3, dtype=torch.float64)

    def sample(self, *args, **kwargs):
        time.sleep(0.003)
        return super().sample(*args, **kwargs)

    def observe(self, indices: torch.Tensor, losses: torch.Tensor, step: int) -> None:
        time.sleep(0.001)


def test_slow_samplers_are_measured_and_fail_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "cases", lambda: [("sampler Slow", Slow)])
    (row,), _ = overhead.run(4, 5, 3)
    assert 3000 < row.sample < 30000
    assert 1000 < row.observe < min(10000, row.sample)
    assert row.sample_ratio > 20
    assert overhead.main(QUICK) == 0
    assert overhead.main([*QUICK, "--check"]) == 1
    assert "above 30 microseconds: sampler Slow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sample", "observe", "slow"), [(30.0, 30.0, []), (30.1, 1.0, ["a"]), (1.0, 30.1, ["a"])]
)
def test_both_figures_have_the_limit(sample: float, observe: float, slow: list[str]) -> None:
    assert overhead.too_slow([overhead.Row("a", sample, 1.0, observe, 1.0)]) == slow
