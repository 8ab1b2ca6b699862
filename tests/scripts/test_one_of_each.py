"""What is declared once is found everywhere: a flag, and a density."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.flag import SHARE, Family, Need, tracked
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.job import Job
from docs import generate_architecture, generate_catalogue
from tests.scripts.small_runs import reset_accelerate

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
EMA = Need("--use_ema", lambda args: args.use_ema)
SETTINGS = ("dataset", "model", "images", "objective", "optimizer", "ema")
FLAG = tracked("haste", float, 0.25, "of all", bound=SHARE, needs=(EMA,), setting="optimizer")


@pytest.fixture(scope="module", autouse=True)
def recipes() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        yield


# -- a flag ----------------------------------------------------------------------------------------


@pytest.fixture
def task() -> Any:
    """The kind of job of the recipe, with one more declaration."""
    from own_job import Mixture  # pyright: ignore[reportMissingImports]

    class Hasty(Mixture):
        more = Family.of("more", FLAG, *(tracked(f"of_{s}", int, 1, setting=s) for s in SETTINGS))
        families = (*Mixture.families, more)
        command_line = CommandLine("Learn in haste.", families)

    return Hasty()


def run(task: Any, folder: Path, steps: int, *more: str) -> None:
    from own_job import training_step  # pyright: ignore[reportMissingImports]

    argv = ["--output_dir", str(folder), "--points", "8", "--train_batch_size", "4", "--use_ema"]
    argv += ["--max_train_steps", str(steps), "--checkpointing_steps", "1", *more]
    reset_accelerate()
    Job(task, argv).train(training_step)


def test_a_flag_is_in_the_parser_and_its_help(task: Any) -> None:
    assert task.parse(["--use_ema", "--haste", "0.5"]).haste == 0.5
    told = " ".join(task.command_line.parser().format_help().split())
    assert "--haste HASTE of all (default 0.25)" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--use_ema --haste 1.5", r"--haste is 1.5.*\[0, 1\]"),
        ("--use_ema --haste nan", r"--haste is nan"),
        ("--haste 0.25", r"--haste is 0.25, which has no effect without --use_ema"),
    ],
)
def test_a_flag_is_checked(task: Any, words: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        task.parse(words.split())


def test_a_flag_is_told_to_trackers_and_stands_in_the_record(task: Any, tmp_path: Path) -> None:
    assert task.parse(["--use_ema", "--haste", "0.5"]).tracked()["haste"] == 0.5
    run(task, tmp_path, 1, "--haste", "0.5")
    record = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert record["sessions"][-1]["arguments"]["haste"] == 0.5


def test_a_flag_is_compared_when_a_run_goes_on(task: Any, tmp_path: Path) -> None:
    run(task, tmp_path, 1, "--haste", "0.5")
    other = ("--resume_from_checkpoint", "latest", "--haste", "0.75")
    with pytest.raises(UsageError, match=r"optimizer.haste is 0.75, was 0.5"):
        run(task, tmp_path, 2, *other)
    run(task, tmp_path, 2, *other, "--allow_config_change", "optimizer")
    assert (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_of_an_own_flag_is_compared(task: Any, tmp_path: Path, setting: str) -> None:
    run(task, tmp_path, 1)
    with pytest.raises(UsageError, match=f"{setting}.of_{setting} is 2, was 1"):
        run(task, tmp_path, 2, "--resume_from_checkpoint", "latest", f"--of_{setting}", "2")


def test_a_flag_has_a_row_in_the_docs(task: Any) -> None:
    table = generate_architecture._table(task.command_line)
    row = r"\| `--haste` \| `0.25` \| of all \| optimizer \| --use_ema \| yes \|"
    assert re.search(row, table)


# -- a density -------------------------------------------------------------------------------------


@pytest.fixture
def triangle() -> Iterator[None]:
    """The density of the recipe, one class; registered as its module is imported."""
    assert "triangle" not in DENSITIES
    from own_density import Triangle  # pyright: ignore[reportMissingImports]

    if "triangle" not in DENSITIES:
        DENSITIES.register("triangle")(Triangle)
    yield
    DENSITIES.remove("triangle")


def test_a_density_is_one_class(triangle: None, task: Any, tmp_path: Path) -> None:
    law = ("--timestep_sampler", "triangle", "--timestep_sampler_args", "w=3", "mu=1")
    run(task, tmp_path, 1, *law)
    facts = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert '"density": "triangle"' in json.dumps(facts)
    assert "| `triangle` |" in generate_catalogue.catalogue().replace(
        "[`triangle`](gallery/README.md#density-triangle)", "`triangle`"
    )
    with pytest.raises(ValueError, match="w=0"):
        dataclasses.replace(DENSITIES["triangle"](), w=0.0)
    unknown = r"--timestep_sampler: 'triangel' is unknown.*is 'triangle' meant"
    with pytest.raises(UsageError, match=unknown):
        run(task, tmp_path / "mistyped", 1, "--timestep_sampler", "triangel")
