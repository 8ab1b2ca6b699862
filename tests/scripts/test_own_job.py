"""A kind of training of one's own is a task and a step: the recipe trains, resumes, survives kills
and exports as the scripts do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.job import Job
from diffusers_curriculum.training.process.stopping import Stopped
from tests.scripts.small_runs import checkpoint_names, hashes, recorded, reset_accelerate

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "own_job.py"
GUIDE = ROOT / "docs" / "adding_a_job.md"
LAW = ("--timestep_sampler", "laplace", "--timestep_draw", "stratified", "--use_ema")
CURRICULUM = ("--curriculum", "difficulty", "--curriculum_clusters", "3")
CURRICULUM += ("--curriculum_patience", "1", "--curriculum_max_share", "1")  # learns when to open


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(RECIPE.parent)
    import own_job  # pyright: ignore[reportMissingImports]

    return own_job


def train(recipe: Any, folder: Path, steps: int, *more: str) -> list[float]:
    """The losses of a small run, by optimizer step."""
    argv = ["--output_dir", str(folder), "--points", "64", "--seed", "3", *LAW, *CURRICULUM]
    argv += ["--train_batch_size", "8", "--max_train_steps", str(steps)]
    argv += ["--learning_rate", "1e-2", "--lr_warmup_steps", "0", "--checkpointing_steps", "4"]
    reset_accelerate()
    with recorded() as record:
        Job(recipe.Mixture(), [*argv, *more]).train(recipe.training_step)
    return [float.fromhex(step.loss) for step in record.steps]


def test_it_learns_and_exports(recipe: Any, tmp_path: Path) -> None:
    train(recipe, tmp_path, 300, "--checkpointing_steps", "300")
    network = recipe.Network.from_pretrained(tmp_path)
    assert error(network) < 0.5 * error(recipe.Network())
    name = "diffusion_pytorch_model.safetensors"
    told = hashes(tmp_path)
    assert told[name] == told[f"checkpoint-300/network_ema/{name}"]  # what is left is the average
    assert told[name] != told[f"checkpoint-300/network/{name}"]


@torch.no_grad()
def error(network: torch.nn.Module, timestep: int = 400) -> float:
    """Mean squared error of the noise in the centre of one of the four clouds."""
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    at = torch.full((512,), timestep)
    noisy = DDPMScheduler().add_noise(torch.ones(512, 2), noise, at)  # pyright: ignore[reportArgumentType]
    return float((network(noisy, at) - noise).square().mean())


def test_a_resumed_run_has_the_bits_of_one_that_never_ended(recipe: Any, tmp_path: Path) -> None:
    whole = train(recipe, tmp_path / "whole", 8)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "parts", 8, "--max_hours", "1e-9")
    second = train(recipe, tmp_path / "parts", 8, "--resume_from_checkpoint", "latest")
    assert 0 < len(second) < 8
    assert second == whole[-len(second) :]
    for kept in ("diffusion_pytorch_model", "checkpoint-8"):
        assert tensors(tmp_path / "parts", kept) == tensors(tmp_path / "whole", kept) != {}


def test_a_resumed_curriculum_stays_at_its_stage(recipe: Any, tmp_path: Path) -> None:
    whole = train(recipe, tmp_path / "whole", 8)
    train(recipe, tmp_path / "parts", 4)
    assert train(recipe, tmp_path / "parts", 8, "--resume_from_checkpoint", "latest") == whole[4:]


def tensors(folder: Path, start: str) -> dict[str, str]:
    """Hashes of the tensor files of a run whose names, from the run's folder on, start so."""
    told = hashes(folder)
    return {k: v for k, v in told.items() if k.startswith(start) and k.endswith(".safetensors")}


def test_a_kill_after_the_last_save_leaves_no_surplus(recipe: Any, tmp_path: Path) -> None:
    train(recipe, tmp_path, 8)
    assert checkpoint_names(tmp_path) == {"checkpoint-4", "checkpoint-8"}
    limit = ("--checkpoints_total_limit", "1")
    train(recipe, tmp_path, 8, "--resume_from_checkpoint", "latest", *limit)
    assert checkpoint_names(tmp_path) == {"checkpoint-8"}


def test_another_number_of_points_is_no_resume(recipe: Any, tmp_path: Path) -> None:
    train(recipe, tmp_path, 4)
    resume = ("--resume_from_checkpoint", "latest")
    with pytest.raises(UsageError, match="points"):
        train(recipe, tmp_path, 8, *resume, "--points", "32")
    train(recipe, tmp_path, 8, *resume, "--points", "32", "--allow_config_change", "dataset")
    assert "checkpoint-8" in checkpoint_names(tmp_path)


@pytest.mark.slow
def test_it_survives_kills(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(240) == 0
    for number in (20, 60):
        run = start(killed, "--resume_from_checkpoint", "latest")
        limit = time.monotonic() + 120
        while not (killed / f"checkpoint-{number}").is_dir():
            assert run.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < limit
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait(60) == -signal.SIGKILL
    assert start(killed, "--resume_from_checkpoint", "latest").wait(240) == 0
    for kept in ("diffusion_pytorch_model", "checkpoint-160"):
        assert tensors(killed, kept) == tensors(whole, kept) != {}


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    argv = ["--output_dir", str(folder), "--points", "64", "--seed", "3", *LAW, *more]
    argv += ["--train_batch_size", "8", "--max_train_steps", "160", "--checkpointing_steps", "20"]
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(RECIPE), *argv]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, env=os.environ | quiet, stdout=null, stderr=null)


# -- the guide -------------------------------------------------------------------------------------


def test_the_guide_shows_the_recipe_as_it_is() -> None:
    """Every block of code in the guide stands in the recipe, and they are most of it."""
    source, guide = RECIPE.read_text("utf-8"), GUIDE.read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert all(block in source for block in blocks), "copy the recipe's lines into the guide"
    shown = sum(len(block.splitlines()) for block in blocks)
    assert shown >= 0.6 * len(source.splitlines())


def test_the_commands_of_the_guide_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    assert len(commands) >= 2
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands:
        words = command.split()
        assert words[:2] == ["python", "examples/recipes/own_job.py"]
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "points" / "run.json").read_text("utf-8"))
    sessions = record["sessions"]
    assert [s["arguments"]["points"] for s in sessions] == [1000, 1000]
    assert [s["last_step"] for s in sessions] == [200, 300]
