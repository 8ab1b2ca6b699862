"""The validation loss of every script: what it is, when it is told, that it changes nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.publish.metrics_record import read_metrics
from tests.scripts.every_script import SCRIPTS, STEPS, STOPPED, Reached, Script, after_update
from tests.scripts.small_runs import Record, hashes, recorded, write_images

WITH_LEVELS = [name for name in SCRIPTS if name not in ("vit_vqgan", "own_job")]
QUANTILES, HELD_OUT = 3, 5


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Images that the scripts' runs do not train on."""
    return write_images(tmp_path / "held_out", HELD_OUT)


def validating(folder: Path) -> tuple[object, ...]:
    every = ("--validation_loss_steps", STOPPED, "--validation_loss_quantiles", QUANTILES)
    return ("--validation_data_dir", folder, *every)


def script_of(name: str, work: Path, patch: pytest.MonkeyPatch) -> Script:
    torch.set_num_threads(1)
    return Script(name, work, patch)


def run(script: Script, output: str, *more: object) -> tuple[Path, Record]:
    script.output = script.work / output
    with recorded() as record:
        script.main(*more)
    return script.output, record


def told(output: Path) -> dict[int, dict[str, float]]:
    """What the file holds, by step."""
    lines = read_metrics(output / "validation_loss.jsonl")
    return {step: {k: v for k, v in line.items() if k != "step"} for step, line in lines.items()}


def logged(record: Record) -> dict[int, dict[str, float]]:
    """What the trackers got, by step."""
    prefix = "validation_loss/"
    return {
        step: {name.removeprefix(prefix): x for name, x in values.items()}
        for step, values in record.logged
        if any(name.startswith(prefix) for name in values)
    }


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", WITH_LEVELS)
def test_it_is_told_survives_a_stop_and_changes_nothing(
    name: str, tmp_path: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = script_of(name, tmp_path, monkeypatch)
    plain, without = run(script, "plain")
    whole, record = run(script, "whole", *validating(held_out))
    assert record.steps == without.steps
    last = f"checkpoint-{STEPS}"
    assert hashes(whole / last) == hashes(plain / last) != {}

    values = told(whole)
    assert [*values] == [0, STOPPED, STEPS]
    assert {line.pop("samples") for line in values.values()} == {HELD_OUT}
    assert logged(record) == values
    for line in values.values():
        raw = {name: x for name, x in line.items() if name.startswith("raw/")}
        assert len(raw) == QUANTILES
        assert line["raw"] == pytest.approx(sum(raw.values()) / QUANTILES)
        assert all(0 < x < math.inf for x in line.values())
    assert len({line["raw"] for line in values.values()}) == 3
    assert values[STEPS]["ema"] != values[STEPS]["raw"]

    part = tmp_path / "part"
    shutil.copytree(whole / f"checkpoint-{STOPPED}", part / f"checkpoint-{STOPPED}")
    resumed = (*validating(held_out), "--resume_from_checkpoint", f"checkpoint-{STOPPED}")
    _, again = run(script, "part", *resumed)
    assert [*logged(again).items()] == [(n, values[n]) for n in (STOPPED, STEPS)]  # made up
    _, once_more = run(script, "part", *resumed)
    assert [*logged(once_more)] == [STEPS]  # and not done again
    assert [*told(part)] == [STOPPED, STEPS]


def first(script: Script, output: str, *more: object) -> dict[str, float]:
    """What a run tells before its first step."""
    script.output = script.work / output
    with after_update(), pytest.raises(Reached):
        script.main(*more)
    return told(script.output)[0]


def test_no_law_weight_seed_or_disturbance_changes_it(
    tmp_path: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = script_of("text_to_image", tmp_path, monkeypatch)
    flags = validating(held_out)
    values = first(script, "one", *flags)
    others = ("--seed", 11, "--timestep_sampler_args", "mu=-3", "b=1", "--snr_gamma", 1)
    others += ("--noise_offset", 0.5, "--input_perturbation", 0.5, "--caption_dropout", 0.9)
    assert first(script, "other", *flags, *others) == values
    more = first(script, "all", *flags, "--validation_loss_samples", 3)
    assert more["samples"] == 3
    assert more["raw"] != values["raw"]


def test_it_is_the_loss_of_the_official_formulas(
    tmp_path: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = script_of("text_to_image", tmp_path, monkeypatch)
    values = first(script, "run", *validating(held_out))
    argv = script.argv()
    base = argv[argv.index("--pretrained_model_name_or_path") + 1]
    pipeline: Any = StableDiffusionPipeline.from_pretrained(base)
    losses = np.array([_losses(pipeline, held_out, row) for row in range(HELD_OUT)])
    each = [x for name, x in values.items() if name.startswith("raw/")]
    np.testing.assert_allclose(each, losses.mean(0), rtol=1e-4)


@torch.no_grad()
def _losses(pipeline: Any, folder: Path, row: int) -> list[float]:
    """Of one held-out image, by diffusers alone."""
    with Image.open(folder / f"{row:02d}.png") as image:
        small = image.convert("RGB").resize((8, 8), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 127.5 - 1
    posterior = pipeline.vae.encode(pixels).latent_dist
    draw = {
        purpose: torch.from_numpy(
            host_generator(0, 0, row, purpose=f"validation {purpose}").standard_normal(
                posterior.mean.shape[1:], dtype=np.float32
            )
        )[None]
        for purpose in ("posterior", "noise")
    }
    latents = posterior.mean + posterior.std * draw["posterior"]
    latents = latents * pipeline.vae.config.scaling_factor
    text, _ = pipeline.encode_prompt(f"picture number {row}", "cpu", 1, False)
    scheduler, losses = pipeline.scheduler, []
    for quantile in range(QUANTILES):
        level = int((quantile + 0.5) / QUANTILES * scheduler.config.num_train_timesteps)
        timestep = torch.tensor([level])
        noisy = scheduler.add_noise(latents, draw["noise"], timestep)
        prediction = pipeline.unet(noisy, timestep, text).sample
        target = draw["noise"]
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, draw["noise"], timestep)
        losses.append(float(torch.nn.functional.mse_loss(prediction, target)))
    return losses


def test_what_is_kept_apart_is_not_trained_on_and_is_a_fact_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = script_of("text_to_image", tmp_path, monkeypatch)
    output, _ = run(script, "run", "--validation_split", 0.3)
    facts = json.loads((output / "run.json").read_text())["facts"]
    assert facts["num_samples"] == 8  # of 11
    assert [*told(output)] == [0, STOPPED, STEPS]  # as often as checkpoints are written
    resumed = ("--resume_from_checkpoint", f"checkpoint-{STOPPED}", "--validation_split", 0.2)
    with pytest.raises(UsageError, match="allow_config_change dataset"):
        script.main(*resumed)
    elsewhere = write_images(tmp_path / "elsewhere", 4)
    output, _ = run(script, "apart", *validating(elsewhere))
    shutil.rmtree(elsewhere)
    write_images(elsewhere, 3)
    again = ("--resume_from_checkpoint", f"checkpoint-{STOPPED}", *validating(elsewhere))
    with pytest.raises(UsageError, match="the same of the samples that are kept apart"):
        script.main(*again)


def test_more_levels_than_the_schedule_has_are_refused(
    tmp_path: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = script_of("text_to_image", tmp_path, monkeypatch)
    flags = (*validating(held_out), "--validation_loss_quantiles", 1001)
    assert "1001, and the schedule has 1000" in script.refused(*flags)
