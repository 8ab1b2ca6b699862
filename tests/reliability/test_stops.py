"""A run that is told to stop, at any moment, saves the step it is in and goes on bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.reliability.harness import Kill, differing_file_bits, differing_loss_bits, live, lost
from tests.reliability.test_kills import STEPS, VARIANTS
from tests.scripts.small_runs import Bench

pytestmark = pytest.mark.reliability

TERM, BOTH = (signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM)
# How often a signal comes after which event, and after how many of them at most.
MOMENTS = {"step": (0.6, 5), "save": (0.4, 2)}


def stops(seed: int) -> Iterator[Kill]:
    """Signals at random moments of training, many of them during a save, some sent twice."""
    draw = np.random.default_rng(seed)
    shares = [share for share, _ in MOMENTS.values()]
    while True:
        what = str(draw.choice(list(MOMENTS), p=shares))
        count = int(draw.integers(1, MOMENTS[what][1] + 1))
        yield Kill(what, count, float(draw.random()), BOTH if draw.random() < 0.3 else TERM)


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "wanted", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_sigterm_saves_exact_step(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: int
) -> None:
    argv = bench.argv(tmp_path, *VARIANTS["everything"])
    reference = live(tmp_path / "reference", argv, script=bench.script)
    lives, plan, stopped, sent = [], stops(seed=wanted), 0, []
    while stopped < wanted:
        assert len(lives) < wanted, "the signals come too late"
        few = list(islice(plan, wanted - stopped))
        run = tmp_path / f"run-{len(lives)}"
        lives.append(live(run, argv, few, reference.pace, script=bench.script))
        sent += few[: len(lives[-1].starts) - 1]
        for start, following in pairwise(lives[-1].starts):
            done = start.steps[-1]["step"] + 1
            assert start.status == 128 + signal.SIGTERM
            assert start.saved[-1] == done
            assert following.resumed_at == done
            stopped += 1
    bits = [differing_loss_bits(life, reference) for life in lives]
    bits += [differing_file_bits(life, reference, f"checkpoint-{STEPS}") for life in lives]
    made = sum(len(start.steps) for life in lives for start in life.starts)
    with capsys.disabled():
        print(
            f"\nSIGTERM: {stopped} stops of {len(lives)} runs, "
            f"{sum(stop.after == 'save' for stop in sent)} sent during a save, "
            f"{sum(stop.numbers == BOTH for stop in sent)} sent twice, "
            f"{sum(bits)} differing bits, {made - STEPS * len(lives)} steps repeated"
        )
    assert not any(bits)
    assert made == STEPS * len(lives)  # nothing is done twice: the last step was saved
    assert not any(lost(life) for life in lives)


@pytest.mark.thinned(4)
def test_the_second_ctrl_c_leaves_a_whole_checkpoint(bench: Bench, tmp_path: Path) -> None:
    argv = bench.argv(tmp_path, *VARIANTS["full"])
    reference = live(tmp_path / "reference", argv, script=bench.script)
    kill = Kill("save", 2, 0.5, (signal.SIGINT, signal.SIGINT))
    life = live(tmp_path / "run", argv, [kill], reference.pace, script=bench.script)
    assert life.starts[0].status == 128 + signal.SIGINT
    assert not lost(life)
    assert differing_loss_bits(life, reference) == 0
