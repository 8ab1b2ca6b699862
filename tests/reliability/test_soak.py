"""A long run takes no more memory, descriptors or time per step at its end than at its start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.reliability.harness import Life, live
from tests.scripts.small_runs import Bench

pytestmark = pytest.mark.reliability

# All that is done while training: reports, pictures of the density, checkpoints, rotation.
OPTIONS = (
    *("--use_ema", "--log_every", 10, "--random_flip"),
    *("--timestep_sampler", "laplace", "--curriculum", "difficulty", "--curriculum_clusters", 4),
    *("--curriculum_patience", 1, "--curriculum_max_share", 0.5),
    *("--checkpointing_steps", 50, "--checkpoints_total_limit", 2),
)
GROWTH = 0.02
DRIFT = 0.10


@dataclass(frozen=True)
class Windows:
    """Two windows of steps to compare: the first after warm-up, and the last."""

    warm_up: int
    width: int

    def ends(self, values: Sequence[float]) -> tuple[float, float]:
        """The median of a quantity in the first and in the last window."""
        first = values[self.warm_up : self.warm_up + self.width]
        return median(first), median(values[-self.width :])

    def growth(self, values: Sequence[float]) -> float:
        """By which share the median grows from the first window to the last."""
        first, last = self.ends(values)
        return last / first - 1


SHORT, LONG = Windows(warm_up=60, width=30), Windows(warm_up=400, width=500)


def column(life: Life, name: str) -> list[float]:
    """A quantity after each step."""
    return [step[name] for step in life.steps.values()]


def drift(life: Life, windows: Windows) -> float:
    """By which share a step takes more CPU time at the end, measured by a fixed piece of work.

    CPU time and not time, and relative to that work, so that other people's load is not in it.
    """
    after, yards = column(life, "cpu"), column(life, "yard")
    spent = [end - begin for begin, end in pairwise(after)]
    return windows.growth([(s - yard) / yard for s, yard in zip(spent, yards, strict=False)])


def check(life: Life, windows: Windows) -> str:
    """Check memory and descriptors, and tell them."""
    memory, files = column(life, "rss"), column(life, "files")
    told = (
        f"resident {windows.ends(memory)[0] / 2**20:.1f} MiB, "
        f"growth {windows.growth(memory):+.2%}, descriptors {sorted(set(files))}"
    )
    assert windows.growth(memory) < GROWTH, told
    assert len(set(files[windows.warm_up :])) == 1, told
    return told


def soak(bench: Bench, folder: Path, steps: int, plot_every: int) -> Life:
    more = ("--timestep_plot_steps", plot_every, "--max_train_steps", steps)
    life = live(folder, bench.argv(folder, *OPTIONS, *more), vitals=True, script=bench.script)
    assert sorted(life.steps) == list(range(steps))
    assert len(life.starts[0].saved) == steps // 50
    return life


@pytest.mark.thinned(6)
def test_soak_150_steps(bench: Bench, tmp_path: Path) -> None:
    check(soak(bench, tmp_path, 150, plot_every=20), SHORT)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_soak_2000_steps(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that slows down does so every time; a machine that does (some of them by a quarter, for
    a minute) need not: the smallest drift of up to three runs counts."""
    drifts: list[float] = []
    while not drifts or (min(drifts) >= DRIFT and len(drifts) < 3):
        life = soak(bench, tmp_path / str(len(drifts)), 2000, plot_every=100)
        found = check(life, LONG)
        drifts.append(drift(life, LONG))
        with capsys.disabled():
            print(f"\nsoak, 2000 steps: {found}, step-time drift {drifts[-1]:+.2%}")
    assert min(drifts) < DRIFT


# -- the measures find what they are for -----------------------------------------------------------


def made_up(steps: int, **changes: Callable[[int], float]) -> Any:
    """A life in which one quantity changes with the step."""
    steady: dict[str, Callable[[int], float]] = {
        "rss": lambda k: 400e6 + 1e5 * (k % 7),
        "files": lambda k: 12,
        "cpu": lambda k: 0.02 * k,
        "yard": lambda k: 0.002,
    }
    quantities = steady | changes

    class MadeUp:
        steps: dict[int, dict[str, float]]

    life = MadeUp()
    life.steps = {k: {name: f(k) for name, f in quantities.items()} for k in range(steps)}
    return life


@pytest.mark.parametrize(("steps", "windows"), [(150, SHORT), (2000, LONG)])
def test_a_steady_run_passes(steps: int, windows: Windows) -> None:
    check(made_up(steps), windows)
    assert abs(drift(made_up(steps), windows)) < 1e-6


@pytest.mark.parametrize(
    "leak",
    [
        {"rss": lambda k: 400e6 + 8e3 * k},  # 8 kB per step
        {"files": lambda k: 12 + k // 50},  # one descriptor per checkpoint
        {"files": lambda k: 12 + (k == 1234)},
    ],
)
def test_a_leak_is_found(leak: dict[str, Callable[[int], float]]) -> None:
    with pytest.raises(AssertionError):
        check(made_up(2000, **leak), LONG)


def test_a_slowing_run_is_found() -> None:
    slower = made_up(2000, cpu=lambda k: 0.02 * k + 1e-6 * k * k)  # 2 us more each step
    assert drift(slower, LONG) > DRIFT


def test_a_machine_that_becomes_slower_is_not_a_drift() -> None:
    load = {"cpu": lambda k: 0.02 * k + 3e-6 * k * k, "yard": lambda k: 0.002 * (1 + 3e-4 * k)}
    assert abs(drift(made_up(2000, **load), LONG)) < 0.02
