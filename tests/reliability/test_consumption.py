"""Every sample is seen once per epoch, and as many steps are made as were asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.reliability.harness import Kill, Life, live, lost
from tests.reliability.trial import SHADE
from tests.scripts.small_runs import BENCHES, SAMPLES, Bench, checkpoint_names, write_images

pytestmark = pytest.mark.reliability

BATCH, ACCUMULATION = 2, 2
TOTAL = BATCH * ACCUMULATION
STEPS = 20  # of 4 samples: four epochs of 18 and a part of the fifth; steps straddle epochs


@pytest.fixture(scope="module", params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A data set whose samples are told apart by their brightness, whatever is done to them."""
    folder = tmp_path_factory.mktemp("bench")
    images = write_images(folder / "shades", SAMPLES)
    for number in range(SAMPLES):
        Image.new("RGB", (12, 12), (SHADE * number,) * 3).save(images / f"{number:02d}.png")
    return replace(BENCHES[request.param](folder), images=images)


def consumed(life: Life) -> list[int]:
    """The samples that went into the final weights, in order."""
    steps = life.steps
    assert sorted(steps) == list(range(len(steps)))
    return [sample for number in sorted(steps) for sample in steps[number]["consumed"]]


def repeats_agree(life: Life) -> bool:
    """Whether a step that was made again saw the same samples and had the same loss."""
    seen = {}
    for start in life.starts:
        for step in start.steps:
            found = (step["loss"], step["consumed"])
            if seen.setdefault(step["step"], found) != found:
                return False
    return True


def uneven(samples: list[int]) -> list[str]:
    """What is wrong with a sequence of epochs of which the last may be unfinished."""
    faults = []
    epochs = [samples[i : i + SAMPLES] for i in range(0, len(samples), SAMPLES)]
    for number, epoch in enumerate(epochs):
        twice = [sample for sample, count in Counter(epoch).items() if count > 1]
        strange = [sample for sample in epoch if not 0 <= sample < SAMPLES]
        if twice or strange:
            faults.append(f"epoch {number}: twice {twice}, unknown {strange}: {epoch}")
    if len({tuple(epoch) for epoch in epochs}) < len(epochs):
        faults.append("two epochs have the same order")
    return faults


def moments(seed: int) -> Iterator[Kill]:
    draw = np.random.default_rng(seed)
    while True:
        yield Kill("step", int(draw.integers(1, 7)), float(draw.random()))


@pytest.mark.thinned(7)
@pytest.mark.parametrize(
    "interruptions", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_per_epoch_after_resume(
    bench: Bench,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    workers: int,
    interruptions: int,
) -> None:
    argv = bench.argv(
        tmp_path,
        "--max_train_steps",
        STEPS,
        "--gradient_accumulation_steps",
        ACCUMULATION,
        "--dataloader_num_workers",
        workers,
        "--random_flip",
        "--checkpointing_steps",
        3,
        batch=BATCH,
    )
    reference = live(tmp_path / "reference", argv, script=bench.script)
    expected = consumed(reference)
    assert len(expected) == STEPS * TOTAL
    assert not uneven(expected)
    lives, plan, kills = [], moments(seed=workers), 0
    while kills < interruptions:
        assert len(lives) < 2 * interruptions, "the kills come too late"
        few = islice(plan, interruptions - kills)
        run = tmp_path / f"run-{len(lives)}"
        life = live(run, argv, few, reference.pace, script=bench.script)
        lives.append(life)
        kills += sum(start.killed for start in life.starts)
        assert consumed(life) == expected
        assert repeats_agree(life)
        assert not lost(life)
    made = sum(len(start.steps) for life in lives for start in life.starts)
    with capsys.disabled():
        print(
            f"\nsamples, {workers} workers: {kills} interruptions of {len(lives)} runs, "
            f"{made - STEPS * len(lives)} steps repeated, 0 samples missed or seen twice"
        )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda samples: [samples[1], *samples[1:]], "twice"),
        (lambda samples: [*samples[:4], *samples], "twice"),  # a step's data repeated on resume
        (lambda samples: samples[:SAMPLES] * 2, "same order"),
        (lambda samples: [99, *samples[1:]], "unknown"),
    ],
)
def test_the_check_finds_what_it_is_for(
    change: Callable[[list[int]], list[int]], fault: str
) -> None:
    epochs = [np.random.default_rng(i).permutation(SAMPLES).tolist() for i in range(3)]
    samples = [sample for epoch in epochs for sample in epoch]
    assert not uneven(samples)
    assert fault in str(uneven(change(samples)))


# -- the number of steps ---------------------------------------------------------------------------

EPOCHS = 2


@pytest.mark.thinned(17)
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("steps", [None, 7], ids=["epochs", "steps"])
@pytest.mark.parametrize("resumed_from", [0, 1, 4])
def test_optimizer_steps_equal_max_train_steps(
    bench: Bench, tmp_path: Path, resumed_from: int, steps: int | None, accumulation: int
) -> None:
    batch = 4  # 18 samples are no multiple of it
    argv = ["--gradient_accumulation_steps", accumulation, "--checkpointing_steps", 1]
    length = ["--num_train_epochs", EPOCHS] if steps is None else ["--max_train_steps", steps]
    both = bench.argv(tmp_path, *argv, "--max_train_steps", resumed_from, batch=batch)
    starts = list(live(tmp_path, both, script=bench.script).starts) if resumed_from else []
    argv = bench.argv(tmp_path, *argv, *length, batch=batch)
    life = live(tmp_path, argv, script=bench.script)
    life.starts = [*starts, *life.starts]

    total = batch * accumulation
    wanted = -(-EPOCHS * SAMPLES // total) if steps is None else steps
    wanted = max(wanted, resumed_from)  # one that is past its end makes no step
    made = [step["step"] for start in life.starts for step in start.steps]
    assert made == list(range(wanted))
    assert len(consumed(life)) == wanted * total
    assert not uneven(consumed(life))
    assert checkpoint_names(life.folder) == {f"checkpoint-{k + 1}" for k in range(wanted)}
    state = load_file(life.folder / f"checkpoint-{wanted}" / "optimizer.safetensors")
    counters = {int(value) for name, value in state.items() if name.endswith("step")}
    assert counters == {wanted}
