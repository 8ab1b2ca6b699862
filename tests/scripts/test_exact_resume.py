"""A run that was stopped after any step goes on bit for bit, and ends where it was told to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.reliability.harness import ROOT
from tests.scripts.small_runs import (
    BENCHES,
    SAMPLES,
    Bench,
    Record,
    checkpoint_names,
    hashes,
    status,
    train,
)

STEPS = 24  # more than five epochs of 4.5 steps
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
LAST = f"checkpoint-{STEPS}"
SOME = {1, 4, 5, 9, 14, 18, 22, 23}  # in every run of the tests; the others in the full tier
EVERYTHING = (
    *("--max_train_steps", STEPS, "--gradient_accumulation_steps", 2, "--use_ema"),
    *("--ema_decay", 0.9, "--log_every", 5, "--lr_scheduler", "cosine", "--lr_warmup_steps", 3),
    *("--timestep_sampler", "laplace", "--timestep_sampler_args", "mu=1", "b=2"),
    *("--timestep_draw", "stratified", "--importance_correction", "0.5"),
    *("--curriculum", "difficulty", "--curriculum_clusters", 4, "--curriculum_patience", 1),
    *("--curriculum_max_share", 1, "--random_flip", "--caption_dropout", 0.2),
)


@dataclass(frozen=True)
class Reference:
    """A run that was never stopped."""

    folder: Path
    record: Record


@pytest.fixture(scope="module", params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each training script, with a model, a data set and a cache folder."""
    torch.set_num_threads(1)
    return BENCHES[request.param](tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def reference(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Two dozen steps with everything that has a state, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("reference")
    return Reference(folder, bench.train(folder, *EVERYTHING, "--checkpointing_steps", 1))


def resumed_from(reference: Reference, step: int, folder: Path) -> Path:
    """A fresh output folder with one checkpoint of the reference."""
    name = f"checkpoint-{step}"
    shutil.copytree(reference.folder / name, folder / name)
    return folder


def optimizer_steps(checkpoint: Path) -> set[int]:
    """How often the optimizer itself says that it has stepped."""
    state = load_file(checkpoint / "optimizer.safetensors")
    return {int(value) for name, value in state.items() if name.endswith("step")}


def test_the_reference_has_something_to_lose(bench: Bench, reference: Reference) -> None:
    stages = [step.stage for step in reference.record.steps]
    assert len(set(stages)) >= 3
    assert stages == sorted(stages)
    assert len(set(reference.record.losses)) == STEPS
    assert len({step.lr for step in reference.record.steps}) > STEPS // 2
    assert checkpoint_names(reference.folder) == {f"checkpoint-{k + 1}" for k in range(STEPS)}
    saved = hashes(reference.folder / f"checkpoint-{STEPS}")
    averaged = f"{bench.trained}_ema/diffusion_pytorch_model.safetensors"
    expected = {f"{bench.trained}/{bench.weights}", "optimizer.safetensors"}
    expected |= {averaged, "sampler.safetensors"}
    assert hashes(reference.folder / bench.exported)
    assert expected < saved.keys()
    assert len({saved[name] for name in expected}) == len(expected)


@pytest.mark.thinned(2)
@pytest.mark.reliability
@pytest.mark.parametrize(
    "stopped",
    [pytest.param(k, marks=() if k in SOME else pytest.mark.slow) for k in range(1, STEPS)],
)
def test_resume_from_every_step_bits(
    bench: Bench, reference: Reference, tmp_path: Path, stopped: int
) -> None:
    folder = resumed_from(reference, stopped, tmp_path)
    rest = ("--resume_from_checkpoint", "latest", "--checkpointing_steps", STEPS)
    record = bench.train(folder, *EVERYTHING, *rest)
    assert record.numbers == list(range(stopped, STEPS))
    assert record.steps == reference.record.steps[stopped:]
    assert hashes(folder / LAST) == hashes(reference.folder / LAST)
    assert hashes(folder / bench.exported) == hashes(reference.folder / bench.exported)
    # The reports do not notice either: a window that was open when the run stopped goes on.
    later = [entry for entry in reference.record.logged if entry[0] > stopped]
    assert record.logged == later


@pytest.mark.thinned(8)
@pytest.mark.reliability
def test_a_fresh_process_goes_on_bit_for_bit(
    bench: Bench, reference: Reference, tmp_path: Path
) -> None:
    folder = resumed_from(reference, 5, tmp_path)
    rest = ("--resume_from_checkpoint", "latest", "--checkpointing_steps", STEPS)
    subprocess.run(
        [sys.executable, str(bench.module.__file__), *bench.argv(folder, *EVERYTHING, *rest)],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=200,
    )
    assert hashes(folder / LAST) == hashes(reference.folder / LAST)


@pytest.mark.thinned(3)
def test_resuming_a_wrong_state_would_be_seen(
    bench: Bench, reference: Reference, tmp_path: Path
) -> None:
    other = bench.train(tmp_path, *EVERYTHING, "--seed", 8)
    assert not set(other.losses) & set(reference.record.losses)


@pytest.mark.thinned(2)
@pytest.mark.reliability
def test_a_finished_run_makes_no_step_and_still_exports(
    bench: Bench, reference: Reference, tmp_path: Path
) -> None:
    folder = resumed_from(reference, STEPS, tmp_path)
    more = ("--resume_from_checkpoint", "latest", "--validation_prompts", "a", "b")
    record = bench.train(folder, *EVERYTHING, *more, pictures=True)
    assert record.steps == []
    assert hashes(folder / bench.exported) == hashes(reference.folder / bench.exported)
    expected = {bench.index, "README.md", "timesteps.png"}
    expected |= {"val_imgs_grid.png"} if bench.words.get("--validation_prompts", True) else set()
    assert expected <= {path.name for path in folder.iterdir()}


def test_a_run_past_its_end_makes_no_step(
    bench: Bench, reference: Reference, tmp_path: Path
) -> None:
    folder = resumed_from(reference, 8, tmp_path)
    arguments = (*EVERYTHING, "--max_train_steps", 5, "--curriculum_max_share", 9)
    record = bench.train(folder, *arguments, "--resume_from_checkpoint", "latest")
    assert record.steps == []
    assert checkpoint_names(folder) == {"checkpoint-8"}
    assert (folder / bench.index).is_file()


# -- the number of steps ---------------------------------------------------------------------------


@pytest.mark.thinned(5)
@pytest.mark.reliability
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("length", ["--max_train_steps", "--num_train_epochs"])
def test_optimizer_steps_equal_max_train_steps(
    bench: Bench, tmp_path: Path, accumulation: int, resumed: bool, length: str
) -> None:
    batch, number = 3, {"--max_train_steps": 5, "--num_train_epochs": 1}[length]
    shared = ("--gradient_accumulation_steps", accumulation)
    in_an_epoch = -(-SAMPLES // (batch * accumulation))
    wanted = 5 if length == "--max_train_steps" else in_an_epoch
    if resumed:
        bench.train(
            tmp_path, *shared, "--max_train_steps", 1, "--checkpointing_steps", 1, batch=batch
        )
    rest = (*shared, length, number, "--checkpointing_steps", 1)
    rest += ("--resume_from_checkpoint", "latest")
    record = bench.train(tmp_path, *rest, batch=batch)
    assert record.numbers == list(range(int(resumed), wanted))
    assert checkpoint_names(tmp_path) == {f"checkpoint-{k + 1}" for k in range(wanted)}
    assert optimizer_steps(tmp_path / f"checkpoint-{wanted}") == {wanted}


def test_epochs_that_do_not_divide_are_rounded_up(bench: Bench, tmp_path: Path) -> None:
    record = bench.train(tmp_path, "--num_train_epochs", 2, batch=5)
    assert len(record.steps) == 8  # 36 samples in batches of 5


# -- which checkpoint ------------------------------------------------------------------------------


def test_latest_without_checkpoints_starts_at_the_beginning(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        record = bench.train(tmp_path, "--max_train_steps", 1, "--resume_from_checkpoint", "latest")
    assert record.numbers == [0]
    assert "starting from the beginning" in caplog.text


@pytest.mark.thinned(3)
def test_latest_takes_the_newest_by_number(bench: Bench, tmp_path: Path) -> None:
    bench.train(tmp_path, "--max_train_steps", 10, "--checkpointing_steps", 1)
    rest = ("--max_train_steps", 11, "--resume_from_checkpoint", "latest")
    assert bench.train(tmp_path, *rest).numbers == [10]


@pytest.mark.thinned(3)
def test_a_bare_name_means_one_in_the_output_folder(
    bench: Bench, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed_from(reference, 10, tmp_path / "run")
    (tmp_path / "checkpoint-10").mkdir()  # in the working directory: a trap
    monkeypatch.chdir(tmp_path)
    more = ("--resume_from_checkpoint", "checkpoint-10")
    assert bench.train(tmp_path / "run", *EVERYTHING, *more).numbers == list(range(10, STEPS))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("relative", [False, True])
def test_resume_path_is_literal(
    bench: Bench,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    relative: bool,
) -> None:
    before = hashes(reference.folder)
    monkeypatch.chdir(reference.folder)
    name = "./checkpoint-10" if relative else str(reference.folder / "checkpoint-10")
    record = bench.train(tmp_path / "new", *EVERYTHING, "--resume_from_checkpoint", name)
    assert record.steps == reference.record.steps[10:]
    assert hashes(tmp_path / "new" / bench.exported) == hashes(reference.folder / bench.exported)
    assert hashes(reference.folder) == before  # the other run is only read


@pytest.mark.parametrize("name", ["checkpoint-99", "./checkpoint-99", "/nowhere/checkpoint-1"])
def test_a_missing_checkpoint_is_refused(
    bench: Bench, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--max_train_steps", 1, "--resume_from_checkpoint", name)
    assert status(bench.argv(tmp_path, *more), bench.script) == 2
    message = capsys.readouterr().err
    assert name in message
    assert "Give latest" in message


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (("--seed", 8), "--seed 7"),
        (("--train_batch_size", 4), "is 8, was 4"),
        (("--gradient_accumulation_steps", 3), "is 6, was 4"),
        (("--max_train_samples", 9), "number of training samples is 9, was 18"),
        (("--curriculum_clusters", 3), "arguments of the run that wrote it"),
    ],
)
def test_another_run_is_not_gone_on_with(
    bench: Bench,
    reference: Reference,
    tmp_path: Path,
    changed: tuple[object, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = resumed_from(reference, 5, tmp_path)
    more = (*EVERYTHING, "--resume_from_checkpoint", "latest", *changed)
    assert status(bench.argv(folder, *more), bench.script) == 2
    assert told in capsys.readouterr().err


def test_the_seed_of_the_first_run_is_remembered(
    bench: Bench, reference: Reference, tmp_path: Path
) -> None:
    folder = resumed_from(reference, 10, tmp_path)
    argv = bench.argv(folder, *EVERYTHING, "--resume_from_checkpoint", "latest")
    place = argv.index("--seed")
    record = train(argv[:place] + argv[place + 2 :], script=bench.script)
    assert record.steps == reference.record.steps[10:]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("limit", [1, 2])
def test_checkpoints_total_limit_keeps_the_newest(bench: Bench, tmp_path: Path, limit: int) -> None:
    more = ("--max_train_steps", 5, "--checkpointing_steps", 1, "--checkpoints_total_limit", limit)
    bench.train(tmp_path, *more)
    assert checkpoint_names(tmp_path) == {f"checkpoint-{5 - i}" for i in range(limit)}


def test_the_manifest_names_the_run(reference: Reference) -> None:
    facts = json.loads((reference.folder / "checkpoint-3" / "manifest.json").read_text())["facts"]
    assert facts["seed"] == 7
    assert facts["global_batch"] == 4
    assert facts["num_samples"] == SAMPLES
    assert facts["world_size"] == 1
    assert facts["sampler"]["clusters"] == 4
