"""Metrics while an image script trains: they are right, survive a stop, and change nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import eigvals

from diffusers_curriculum.metrics.features import load_feature_network
from diffusers_curriculum.randomness import key
from diffusers_curriculum.training.process.stopping import Stopped, StopRequest
from diffusers_curriculum.training.publish.images import ImagePublisher
from diffusers_curriculum.training.publish.metrics_record import read_metrics
from tests.metrics.tiny_networks import save
from tests.scripts.image_runs import (
    CLASS_SCRIPT,
    RESOLUTION,
    UNCONDITIONAL_SCRIPT,
    Materials,
    load_pipeline,
    make_materials,
)
from tests.scripts.small_runs import Record, hashes, status, train

SCRIPTS = (CLASS_SCRIPT, UNCONDITIONAL_SCRIPT)
STEPS, STOPPED, SAMPLES, CLASSES = 10, 6, 21, 3
VALUES = {"fid", "kid", "precision", "recall"}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    torch.set_num_threads(1)
    materials = make_materials(tmp_path_factory.mktemp("materials"))
    save("resnet", materials.folder / "classifier")
    return materials


def evaluating(materials: Materials, every: int = 4) -> tuple[object, ...]:
    return (
        *("--eval_steps", every, "--eval_metrics", "fid", "kid", "precision_recall"),
        *("--eval_feature_model", materials.folder / "classifier", "--eval_samples", SAMPLES),
        *("--eval_num_inference_steps", 2, "--eval_generation_batch_size", 4),
    )


def run(materials: Materials, output: Path, script: str, *more: object) -> Record:
    space, network = ("VQModel", "dit") if script == CLASS_SCRIPT else ("pixels", "unet")
    argv = materials.argv(output, script, network, space, "--max_train_steps", STEPS, *more)
    return train(argv, script=script)


def logged(record: Record) -> dict[int, dict[str, float]]:
    """What the trackers got of the metrics, by step."""
    return {
        step: {name.removeprefix("eval/"): x for name, x in values.items()}
        for step, values in record.logged
        if any(name.startswith("eval/") for name in values)
    }


def values(output: Path) -> dict[int, dict[str, float]]:
    """What eval_metrics.jsonl holds, by step."""
    lines = read_metrics(output / "eval_metrics.jsonl")
    return {step: {name: line[name] for name in VALUES} for step, line in lines.items()}


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    means, covariances = zip(
        *((x.mean(0), np.cov(x, rowvar=False)) for x in (first, second)), strict=True
    )
    squares: Any = eigvals(covariances[0] @ covariances[1])
    roots = np.sqrt(squares.real.clip(min=0))
    trace = np.trace(covariances[0] + covariances[1]) - 2 * roots.sum()
    return float(np.square(means[0] - means[1]).sum() + trace)


def fid_by_hand(materials: Materials, output: Path, conditional: bool) -> float:
    """Of the exported pipeline's images of all classes in turn, against the files."""
    pipeline, images = load_pipeline(output), []
    for number in range(SAMPLES):  # one by one: batches must not matter
        generator = torch.Generator().manual_seed(key(3, number, purpose="metrics") >> 65)
        options: dict[str, Any] = {"generator": generator, "num_inference_steps": 2}
        if conditional:
            options |= {"class_labels": [number % CLASSES], "guidance_scale": 1.5}
        images.append(pipeline(output_type="np", **options).images)
    files = sorted((materials.folder / "images").glob("*.png"))
    network = load_feature_network(str(materials.folder / "classifier"))
    # the filters that the two scripts resize with where none is given
    filters = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR
    real = np.stack([resized(path, filters[not conditional]) for path in files])
    seen = network(torch.from_numpy(real).permute(0, 3, 1, 2).float() / 255)
    made = network(torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2))
    return frechet(seen.double().numpy(), made.double().numpy())


def resized(path: Path, how: Image.Resampling) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.resize((RESOLUTION, RESOLUTION), how))


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_are_written_right_and_again_after_a_stop(
    materials: Materials, tmp_path: Path, script: str
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    flag = "--ema_decay" if script == CLASS_SCRIPT else "--ema_max_decay"
    more = (*evaluating(materials), "--use_ema", flag, 0.5, "--learning_rate", 1e-2)
    record = run(materials, whole, script, *more, "--checkpointing_steps", STOPPED)
    found = values(whole)
    assert list(found) == [4, 8, 10]
    assert logged(record) == found
    assert len({line["fid"] for line in found.values()}) == 3
    line = json.loads((whole / "eval_metrics.jsonl").read_text("utf-8").splitlines()[0])
    assert (line["samples"], line["training_images"]) == (SAMPLES, 18)
    by_hand = fid_by_hand(materials, whole, script == CLASS_SCRIPT)
    assert np.isclose(found[10]["fid"], by_hand, rtol=5e-3)

    shutil.copytree(whole / f"checkpoint-{STOPPED}", part / f"checkpoint-{STOPPED}")
    rest = run(materials, part, script, *more, "--resume_from_checkpoint", "latest")
    assert rest.steps == record.steps[STOPPED:]
    assert values(part) == {step: found[step] for step in (8, 10)}


def test_metrics_take_the_classes_in_turn(materials: Materials, tmp_path: Path) -> None:
    seen: dict[int, int] = {}
    sampled = ImagePublisher._sampled

    def noting(publisher: Any, pipeline: Any, numbers: Any, labels: Any, *rest: Any) -> Any:
        seen.update(zip(numbers, labels, strict=True))
        return sampled(publisher, pipeline, numbers, labels, *rest)

    with mock.patch.object(ImagePublisher, "_sampled", noting):
        run(materials, tmp_path, CLASS_SCRIPT, *evaluating(materials, every=STEPS))
    assert seen == {number: number % CLASSES for number in range(SAMPLES)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stop_where_metrics_are_due_loses_none(
    materials: Materials, tmp_path: Path, script: str
) -> None:
    """The checkpoint comes first, as there may be no more time; the metrics when it goes on."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(materials, whole, script, *evaluating(materials))
    stops = mock.patch.object(StopRequest, "requested", lambda stop, step: step == 4)
    argv = [str(word) for word in (*evaluating(materials), "--resume_from_checkpoint", "latest")]
    with stops, pytest.raises(Stopped):
        run(materials, part, script, *argv)
    assert values(part) == {}
    stops = mock.patch.object(StopRequest, "requested", lambda stop, step: step == 8)
    with stops, pytest.raises(Stopped):
        run(materials, part, script, *argv)
    assert list(values(part)) == [4]
    again = run(materials, part, script, *argv)
    assert values(part) == values(whole)
    assert list(logged(again)) == [8, 10]  # and 4 is not done again


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_and_pictures_change_nothing(
    materials: Materials, tmp_path: Path, script: str
) -> None:
    plain = run(materials, tmp_path / "plain", script)
    argv = [*evaluating(materials, every=2), "--sampling_scheduler", "DDPMScheduler"]
    if script == CLASS_SCRIPT:
        argv += ["--validation_steps", 3, "--validation_inference_steps", 2]
    else:
        argv += ["--save_images_epochs", 1, "--ddpm_num_inference_steps", 2]
        argv += ["--save_model_epochs", 1]
    space, network = ("VQModel", "dit") if script == CLASS_SCRIPT else ("pixels", "unet")
    words = materials.argv(tmp_path / "much", script, network, space, *argv)
    words.remove("--no_pictures")
    much = train([*words, "--max_train_steps", str(STEPS)], script=script)
    assert list(logged(much)) == [2, 4, 6, 8, 10]
    assert (tmp_path / "much/val_imgs_grid.png").is_file()
    assert much.steps == plain.steps
    folder = "transformer" if network == "dit" else "unet"
    trained = hashes(tmp_path / "much" / folder)
    assert trained == hashes(tmp_path / "plain" / folder) != {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_more_denoising_steps_than_levels_are_refused(
    materials: Materials, tmp_path: Path, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*evaluating(materials), "--ddpm_num_steps", 10, "--eval_num_inference_steps", 11)
    argv = materials.argv(tmp_path, script, "unet", "pixels", *more)
    assert status(argv, script) == 2
    assert "--eval_num_inference_steps is 11" in capsys.readouterr().err
