"""Two gloo processes: each draws its own noise, both hold one state, and both together see what a
single process would have seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusers_curriculum.training.publish.metrics_record import read_metrics
from tests.scripts.small_runs import Bench, train
from tests.scripts.witness import witnessed

ROOT = Path(__file__).parents[2]
STEPS = 200
SHORT = 6

CURRICULUM = (
    *("--max_train_steps", STEPS, "--use_ema", "--timestep_sampler", "laplace"),
    *("--curriculum", "difficulty", "--curriculum_clusters", 6, "--curriculum_patience", 5),
    *("--checkpointing_steps", 10 * STEPS, "--curriculum_max_share", 1, "--log_every", 50),
)
PLAIN = (
    *("--max_train_steps", SHORT, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2),
    *("--noise_offset", 0.1, "--random_flip", "--timestep_draw", "stratified"),
    *("--timestep_sampler", "laplace", "--caption_dropout", 0.3),
)
SCALED = ("--max_train_steps", 1, "--timestep_sampler", "laplace", "--data_scale", "auto")
VALIDATED = ("--max_train_steps", 1, "--validation_split", 0.3, "--validation_loss_quantiles", 2)


def plan(bench: Bench, name: str, folder: Path, *more: object, batch: int, skew: bool) -> Any:
    return {"name": name, "argv": bench.argv(folder / name, *more, batch=batch), "skew": skew}


def launch(plans: list[Any], folder: Path) -> None:
    """Make the runs in two processes, as torchrun starts them."""
    file = folder / "runs.json"
    file.write_text(json.dumps(plans))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.scripts.process_driver", str(file)]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def ranks(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What rank 0 and rank 1 saw in each run."""
    folder = tmp_path_factory.mktemp("ranks")
    twice = ("--gradient_accumulation_steps", 2)
    plans = [
        plan(bench, "long", folder, *CURRICULUM, batch=2, skew=True),
        plan(bench, "short", folder, *PLAIN, batch=2, skew=False),
        plan(bench, "accumulated", folder, *PLAIN, *twice, batch=1, skew=False),
        plan(bench, "scaled", folder, *SCALED, batch=2, skew=True),
        plan(bench, "validated", folder, *VALIDATED, batch=2, skew=False),
    ]
    launch(plans, folder)
    names = [entry["name"] for entry in plans]
    told = {name: [read(folder / f"{name}.rank{r}.json") for r in range(2)] for name in names}
    return told | {"validation loss": [validation_loss(folder / "validated")]}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def validation_loss(output: Path) -> dict[int, Any]:
    return read_metrics(output / "validation_loss.jsonl")


def column(told: Any, what: str) -> list[Any]:
    """One thing that all samples saw, by step and slot."""
    return [slots[slot][what] for slots in told["seen"].values() for slot in sorted(slots, key=int)]


def together(ranks: list[Any]) -> dict[str, Any]:
    """step -> slot -> what, of all ranks."""
    steps = ranks[0]["seen"]
    return {step: {k: v for r in ranks for k, v in r["seen"][step].items()} for step in steps}


@pytest.mark.reliability
@pytest.mark.parametrize("purpose", ["noise", "posterior"])
def test_ranks_draw_different_noise(ranks: dict[str, list[Any]], purpose: str) -> None:
    first, second = (column(told, purpose) for told in ranks["long"])
    assert len(first) == len(second) == 2 * STEPS
    assert len({*first, *second}) == 4 * STEPS


@pytest.mark.reliability
def test_the_noise_of_two_ranks_is_unrelated(ranks: dict[str, list[Any]]) -> None:
    first, second = (np.array(told["noise"]) for told in ranks["long"])
    assert len(first) == len(second) >= 16 * STEPS
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(len(first))
    assert abs(first.mean() - second.mean()) < 4 * np.sqrt(2 / len(first))


@pytest.mark.reliability
def test_ranks_draw_different_timesteps(ranks: dict[str, list[Any]]) -> None:
    first, second = (np.array(column(told, "level")) for told in ranks["long"])
    assert len(first) == 2 * STEPS
    assert (first == second).mean() < 0.1
    # In the last stage everything is open, and the draws of two ranks are independent.
    open_all = np.repeat(np.array(ranks["long"][0]["stages"]) == 6, 2)
    n = int(open_all.sum())
    assert n > STEPS // 2
    assert abs(np.corrcoef(first[open_all], second[open_all])[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.reliability
def test_curriculum_state_identical_across_ranks(ranks: dict[str, list[Any]]) -> None:
    first, second = ranks["long"]
    assert first["stages"] == second["stages"]
    assert set(first["stages"]) == set(range(1, 7))
    assert first["states"] == second["states"]
    assert len(set(first["states"])) == STEPS
    assert first["losses"] == second["losses"]


def test_the_scale_of_the_data_is_that_of_the_first_rank(
    ranks: dict[str, list[Any]], bench: Bench, tmp_path: Path
) -> None:
    """Measured by itself, that of the other would be eleven times as large."""
    first, second = (told["scale"] for told in ranks["scaled"])
    with witnessed() as alone:
        train(bench.argv(tmp_path, *SCALED, batch=4))
    assert first == second
    assert first == pytest.approx(alone.scale, rel=1e-12)  # which adds in other batches
    levels = [column(told, "level") for told in ranks["scaled"]]
    assert sorted([*levels[0], *levels[1]]) == sorted(
        column(json.loads(json.dumps(alone.__dict__)), "level")
    )


def test_one_process_and_two_have_the_same_validation_loss(
    ranks: dict[str, list[Any]], bench: Bench, tmp_path: Path
) -> None:
    """Five samples: one process takes two more than the other."""
    train(bench.argv(tmp_path, *VALIDATED, batch=4))
    (together,) = ranks["validation loss"]
    assert [*together] == [0, 1]
    for step, line in validation_loss(tmp_path).items():
        assert line["samples"] == 5
        assert together[step] == pytest.approx(line, rel=1e-5)


def test_no_sample_is_seen_by_both_ranks(ranks: dict[str, list[Any]]) -> None:
    first, second = (told["seen"] for told in ranks["short"])
    for step in first:
        assert not first[step].keys() & second[step].keys()
        images = [entry["image"] for r in (first, second) for entry in r[step].values()]
        assert len(images) == 4


@pytest.fixture(scope="module")
def alone(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What single processes see of the same global batches."""
    told = {}
    for name, batch, accumulation in (("whole", 4, 1), ("halves", 2, 2), ("quarters", 1, 4)):
        more = (*PLAIN, "--gradient_accumulation_steps", accumulation)
        with witnessed() as testimony:
            train(bench.argv(tmp_path_factory.mktemp(name), *more, batch=batch))
        told[name] = json.loads(json.dumps(testimony.__dict__))
    return told


@pytest.mark.reliability
@pytest.mark.parametrize("name", ["short", "accumulated"])
def test_one_process_and_two_see_the_same(
    ranks: dict[str, list[Any]], alone: dict[str, Any], name: str
) -> None:
    expected = alone["whole"]["seen"]
    assert together(ranks[name]) == expected
    assert len(expected) == SHORT
    whats = {"image", "condition", "level", "noise", "noise_offset", "posterior"}
    assert all(entry.keys() == whats for slots in expected.values() for entry in slots.values())
    assert all(len(slots) == 4 for slots in expected.values())


@pytest.mark.reliability
def test_losses_do_not_depend_on_how_the_batch_is_split(
    ranks: dict[str, list[Any]], alone: dict[str, Any]
) -> None:
    runs = [*alone.values(), ranks["short"][0], ranks["accumulated"][1]]
    assert all(run["seen"].keys() == runs[0]["seen"].keys() for run in runs)
    for one, other in combinations(runs, 2):
        np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-5)


@pytest.mark.reliability
def test_lr_same_for_1_and_2_processes(ranks: dict[str, list[Any]], alone: dict[str, Any]) -> None:
    expected = alone["whole"]["lrs"]
    assert len(set(expected)) == SHORT - 1  # the warm-up meets one rate of the descent
    runs = [*alone.values(), *ranks["short"], *ranks["accumulated"]]
    assert [run["lrs"] for run in runs] == [expected] * len(runs)
