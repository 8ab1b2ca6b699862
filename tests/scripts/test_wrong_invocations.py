"""Whatever is wrong is told at once: status 2, the value and the remedy, and no model loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_curriculum.training.arguments import environment as environment_checks
from diffusers_curriculum.training.parts.families.base import ModelFamily
from tests.scripts.pipelines import SD, with_scheduler
from tests.scripts.small_runs import Bench, status, train, write_images

ROOT = Path(__file__).parents[2]
ZERO_SNR = ("--pretrained_model_name_or_path", "{zero_snr}")
CURRICULUM = ("--curriculum", "difficulty")
EXPLICIT = ("--curriculum_clustering", "explicit")
LONG = ("--max_train_steps", 10**9)

# arguments; what the message must hold: the value that was given, and what to do
WRONG: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "unknown sampler": (("--timestep_sampler", "laplase"), ("laplase", "laplace", "cauchy")),
    "unknown density parameter": (
        ("--timestep_sampler", "laplace", "--timestep_sampler_args", "nu=1"),
        ("has no parameter 'nu'", "mu, b"),
    ),
    "density parameter out of range": (
        ("--timestep_sampler", "laplace", "--timestep_sampler_args", "b=-1"),
        ("-1", "b"),
    ),
    "arguments of no sampler": (
        ("--timestep_sampler_args", "mu=1"),
        ("mu=1", "--timestep_sampler other than uniform"),
    ),
    "not KEY=VALUE": (
        ("--timestep_sampler", "laplace", "--timestep_sampler_args", "mu"),
        ("--timestep_sampler_args", "mu", "KEY=VALUE"),
    ),
    "unknown draw": (("--timestep_draw", "halton"), ("halton", "sobol")),
    "unknown policy for bad samples": (("--bad_samples", "ignore"), ("ignore", "skip")),
    "unknown policy for NaN": (("--nonfinite", "ignore"), ("ignore", "skip")),
    "unknown setting to change": (
        ("--resume_from_checkpoint", "latest", "--allow_config_change", "everything"),
        ("everything", "optimizer"),
    ),
    "importance above one": (("--importance_correction", "2"), ("2", "[0, 1]")),
    "wrong image column": (("--image_column", "picture"), ("'picture'", "image, text")),
    "wrong caption column": (("--caption_column", "caption"), ("'caption'", "image, text")),
    "missing folder": (("--train_data_dir", "/nowhere/pictures"), ("/nowhere/pictures", "Give a")),
    "no data at all": (("--train_data_dir", "{empty}"), ("empty", "metadata.jsonl")),
    "a corrupt image": (("--train_data_dir", "{corrupt}"), ("05.png", "repair or remove")),
    "a missing caption": (("--train_data_dir", "{uncaptioned}"), ("03.png", "caption is missing")),
    "no metadata": (("--train_data_dir", "{bare}"), ("'text'", "metadata.jsonl")),
    "negative patience": (
        (*CURRICULUM, "--curriculum_patience", -3),
        ("--curriculum_patience is -3", "at least 1"),
    ),
    "one cluster": (
        (*CURRICULUM, "--curriculum_clusters", 1),
        ("--curriculum_clusters is 1", "at least 2"),
    ),
    "clusters > timesteps": ((*CURRICULUM, *LONG, "--curriculum_clusters", 1001), ("1001", "1000")),
    "clusters that cannot fit": (
        (*CURRICULUM, *LONG, "--curriculum_clusters", 20, "--curriculum_min_size", 60),
        ("60", "20"),
    ),
    "boundaries beyond the schedule": (
        (*CURRICULUM, *LONG, *EXPLICIT, "--curriculum_boundaries", 0, 2000),
        ("2000",),
    ),
    "curriculum too long": (
        (*CURRICULUM, "--max_train_steps", 1000),
        ("1000 steps", "--curriculum_patience 8"),
    ),
    "patience without a curriculum": (
        ("--curriculum_patience", 7),
        ("--curriculum_patience is 7", "--curriculum difficulty"),
    ),
    "pacing without its number": (
        (*CURRICULUM, "--curriculum_pacing", "fixed"),
        ("fixed", "--curriculum_stage_steps"),
    ),
    "unknown weighting": (("--loss_weighting", "min-snr"), ("min-snr", "min_snr")),
    "weighting out of range": (
        ("--loss_weighting", "min_snr", "--loss_weighting_args", "gamma=0"),
        ("gamma=0", "greater than 0"),
    ),
    "weighting infinite at zero SNR": (
        (*ZERO_SNR, "--untrained_timestep", 999, "--loss_weighting", "debiased"),
        ("debiased", "infinite", "min_snr"),
    ),
    "epsilon at zero SNR": (ZERO_SNR, ("timestep 999", "v_prediction", "--untrained_timestep 999")),
    "gamma twice": (
        ("--snr_gamma", 5, "--loss_weighting", "p2"),
        ("--snr_gamma 5", "'p2'", "drop one"),
    ),
    "unknown prediction type": (("--prediction_type", "score"), ("'score'", "v_prediction")),
    "v_prediction on flow": (
        ("--pretrained_model_name_or_path", "{flow}", "--prediction_type", "v_prediction"),
        ("v_prediction", "flow", "choose from epsilon, sample, flow"),
    ),
    "epsilon for a scheduler without": (
        ("--pretrained_model_name_or_path", "{flow}", "--prediction_type", "epsilon"),
        ("FlowMatchEulerDiscreteScheduler", "'epsilon'", "use a scheduler"),
    ),
    "dream with v_prediction": (
        ("--dream_training", "--prediction_type", "v_prediction"),
        ("--dream_training", "'v_prediction'", "--prediction_type epsilon"),
    ),
    "not a pipeline": (
        ("--pretrained_model_name_or_path", "{empty}"),
        ("empty", "model_index.json", "saved pipeline"),
    ),
    "no such pipeline": (
        ("--pretrained_model_name_or_path", "/nowhere/sd"),
        ("/nowhere/sd", "Give a folder"),
    ),
    "missing checkpoint": (
        ("--resume_from_checkpoint", "checkpoint-7"),
        ("checkpoint-7", "Give latest"),
    ),
    "damaged checkpoint": (
        ("--resume_from_checkpoint", "{damaged}"),
        ("checkpoint-1", "optimizer.safetensors"),
    ),
    "output is a file": (("--output_dir", "{file}"), ("is a file", "Name a folder")),
    "unknown tracker": (("--report_to", "tensorbord"), ("'tensorbord'", "tensorboard")),
    "8-bit without bitsandbytes": (("--use_8bit_adam",), ("bitsandbytes", "drop the flag")),
    "xformers without CUDA": (
        ("--enable_xformers_memory_efficient_attention",),
        ("xformers", "CUDA device", "drop the flag"),
    ),
    "unknown lr scheduler": (("--lr_scheduler", "cosinus"), ("'cosinus'", "cosine")),
    "zero steps": (("--max_train_steps", 0), ("--max_train_steps is 0", "at least 1")),
    "no batch": (("--train_batch_size", 0), ("--train_batch_size is 0", "at least 1")),
    "an image of no size": (("--resolution", -8), ("--resolution is -8", "at least 1")),
    "NaN for a rate": (("--learning_rate", "nan"), ("--learning_rate is nan", "finite")),
    "a mistyped flag": (("--curiculum", "difficulty"), ("--curiculum", "--curriculum")),
    "an ambiguous flag": (("--val", 3), ("--val", "--validation_prompts", "--validation_epochs")),
    "a bad repository name": (("--push_to_hub", "--hub_model_id", "a/b/c"), ("a/b/c",)),
    "a bad licence": (("--license", "All Rights!"), ("All Rights!", "apache-2.0")),
}


@pytest.fixture(scope="module")
def places(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders and files in which something is wrong."""
    root = tmp_path_factory.mktemp("places")
    named = {name: root / name for name in ("corrupt", "uncaptioned", "bare", "zero_snr", "flow")}
    (root / "empty").mkdir()
    (root / "file").write_text("I am no folder")
    for name in ("corrupt", "uncaptioned", "bare"):
        write_images(named[name], 8)
    image = named["corrupt"] / "05.png"
    image.write_bytes(image.read_bytes()[:60])
    (named["bare"] / "metadata.jsonl").unlink()
    metadata = named["uncaptioned"] / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows[3]["text"] = None
    metadata.write_text("\n".join(map(json.dumps, rows)))
    rescaled = DDPMScheduler(**SD, rescale_betas_zero_snr=True)
    with_scheduler(bench, named["zero_snr"], rescaled)
    with_scheduler(bench, named["flow"], FlowMatchEulerDiscreteScheduler())
    train(bench.argv(root / "run", "--max_train_steps", 1, "--checkpointing_steps", 1))
    damaged = shutil.copytree(root / "run" / "checkpoint-1", root / "damaged" / "checkpoint-1")
    content = bytearray((damaged / "optimizer.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "optimizer.safetensors").write_bytes(content)
    return named | {"empty": root / "empty", "file": root / "file", "damaged": damaged}


def command_line(
    bench: Bench, places: dict[str, Path], output_dir: Path, more: tuple[object, ...]
) -> list[str]:
    """The arguments, with the places put in."""
    texts = [str(part) for part in more]
    filled = [str(places[t[1:-1]]) if t.startswith("{") else t for t in texts]
    return bench.argv(output_dir, "--max_train_steps", 100, *filled)


def test_there_are_enough() -> None:
    assert len(WRONG) >= 20


@pytest.mark.reliability
@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_with_value_and_remedy(
    bench: Bench,
    places: dict[str, Path],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    def installed(package: str) -> bool:
        return package == "xformers" or (package != "bitsandbytes" and is_installed(package))

    is_installed = environment_checks.installed
    monkeypatch.setattr(environment_checks, "installed", installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ModelFamily, "load_components", loaded)
    monkeypatch.chdir(tmp_path)
    more, expected = WRONG[name]
    argv = command_line(bench, places, tmp_path / "out", more)
    started = time.process_time()
    code = status(argv)
    seconds = time.process_time() - started
    message = capsys.readouterr().err.split("error: ")[-1]
    assert code == 2
    assert [part for part in expected if part not in message] == []
    assert "Traceback" not in message
    assert seconds < 5


def test_a_right_invocation_passes_the_same_way(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LoadedError(Exception):
        pass

    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise LoadedError

    monkeypatch.setattr(ModelFamily, "load_components", loaded)
    with pytest.raises(LoadedError):
        status(bench.argv(tmp_path / "out", "--max_train_steps", 100))


def test_every_bad_sample_is_listed(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", 9)
    for number in (2, 6):
        (images / f"0{number}.png").write_bytes(b"no picture")
    argv = bench.argv(tmp_path / "out", "--train_data_dir", images, "--max_train_steps", 1)
    assert status(argv) == 2
    message = capsys.readouterr().err
    assert "2 of 9 samples" in message
    assert all(str(images / f"0{number}.png") in message for number in (2, 6))


@pytest.mark.parametrize("name", ["unknown sampler", "missing folder", "a mistyped flag"])
def test_the_process_ends_with_status_2(
    bench: Bench, places: dict[str, Path], tmp_path: Path, name: str
) -> None:
    more, expected = WRONG[name]
    argv = command_line(bench, places, tmp_path / "out", more)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_text_to_image_curriculum.py"), *argv],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in expected)
