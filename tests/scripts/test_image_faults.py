"""What may go wrong around an image run: another autoencoder, a lost one, a Hub that is away."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from diffusers_curriculum.training.errors import HubError, UsageError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.publish.images import ImagePublisher
from tests.scripts.image_runs import (
    CLASS_SCRIPT,
    UNCONDITIONAL_SCRIPT,
    Materials,
    load_pipeline,
    make_materials,
)
from tests.scripts.small_runs import checkpoint_names, hashes, status, train
from tests.training.command_lines import parse_class_args


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    torch.set_num_threads(1)
    return make_materials(tmp_path_factory.mktemp("materials"))


def another_autoencoder(materials: Materials, folder: Path) -> Path:
    """One of the same architecture, config and file sizes, with other weights."""
    vae = AutoencoderKL.from_pretrained(materials.folder / "AutoencoderKL")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.5)
    vae.save_pretrained(folder)
    return folder


def argv(materials: Materials, output: Path, *more: object) -> list[str]:
    steps = ("--max_train_steps", 4, "--checkpointing_steps", 2)
    return materials.argv(output, CLASS_SCRIPT, "dit", "AutoencoderKL", *steps, *more)


def test_latents_of_another_autoencoder_are_not_taken(
    materials: Materials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--cache_latents", "--latent_cache_dir", tmp_path / "cache")
    assert status(argv(materials, tmp_path / "a", *cache), CLASS_SCRIPT) == 0
    other = another_autoencoder(materials, tmp_path / "vae")
    more = (*cache, "--pretrained_vae_model_name_or_path", other)
    capsys.readouterr()
    assert status(argv(materials, tmp_path / "b", *more), CLASS_SCRIPT) == 2
    told = capsys.readouterr().err
    assert "autoencoder" in told
    assert str(tmp_path / "cache") in told
    # the same one elsewhere is the same one, and so is another seed's run
    moved = shutil.copytree(materials.folder / "AutoencoderKL", tmp_path / "moved")
    more = (*cache, "--pretrained_vae_model_name_or_path", moved, "--seed", 9)
    before = hashes(tmp_path / "cache")
    assert status(argv(materials, tmp_path / "c", *more), CLASS_SCRIPT) == 0
    assert hashes(tmp_path / "cache") == before


def test_nothing_is_encoded_for_a_run_that_cannot_start(
    materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer that cannot be built is told before hours of encoding."""

    def refuse(*_: object) -> None:
        raise UsageError("no such optimizer")

    monkeypatch.setattr("diffusers_curriculum.training.parts.optimizers._built", refuse)
    cache = ("--cache_latents", "--latent_cache_dir", tmp_path / "cache")
    assert status(argv(materials, tmp_path / "a", *cache), CLASS_SCRIPT) == 2
    assert not (tmp_path / "cache").exists()


def test_a_run_does_not_go_on_in_other_latents(
    materials: Materials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(argv(materials, tmp_path), script=CLASS_SCRIPT)
    other = another_autoencoder(materials, tmp_path / "vae")
    more = ("--pretrained_vae_model_name_or_path", other, "--max_train_steps", 6)
    more += ("--resume_from_checkpoint", "latest")
    assert status(argv(materials, tmp_path, *more), CLASS_SCRIPT) == 2
    assert "model.autoencoder is" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_pipeline_is_saved_though_the_autoencoder_has_gone(
    materials: Materials, tmp_path: Path, precision: str
) -> None:
    vae = shutil.copytree(materials.folder / "AutoencoderKL", tmp_path / "vae")
    kept = ImagePublisher.finish

    def finish(publisher: Any, *models: Any) -> None:
        shutil.rmtree(vae)
        kept(publisher, *models)

    more = ("--pretrained_vae_model_name_or_path", vae, "--mixed_precision", precision)
    with mock.patch.object(ImagePublisher, "finish", finish):
        train(argv(materials, tmp_path / "run", *more), script=CLASS_SCRIPT)
    saved = load_pipeline(tmp_path / "run").vae.state_dict()
    original = AutoencoderKL.from_pretrained(materials.folder / "AutoencoderKL").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in original.items())


@pytest.mark.parametrize("cached", [False, True])
def test_half_precision_encodes_in_half_unless_it_is_once_for_all(
    materials: Materials, tmp_path: Path, loaded: list[torch.dtype], cached: bool
) -> None:
    more = ("--mixed_precision", "bf16", *(("--cache_latents",) if cached else ()))
    train(argv(materials, tmp_path, *more), script=CLASS_SCRIPT)
    assert loaded == [torch.float32 if cached else torch.bfloat16]


@pytest.mark.parametrize(
    ("script", "network", "steps"),
    [
        (CLASS_SCRIPT, "dit", "--validation_inference_steps"),
        (UNCONDITIONAL_SCRIPT, "unet", "--ddpm_num_inference_steps"),
    ],
)
def test_an_autoencoder_is_loaded_where_something_is_left_for_it(
    materials: Materials,
    tmp_path: Path,
    loaded: list[torch.dtype],
    script: str,
    network: str,
    steps: str,
) -> None:
    cache = ("--cache_latents", "--latent_cache_dir", tmp_path / "cache", "--max_train_steps", 2)

    def losses(name: str, *more: object, pictures: bool = False) -> list[str]:
        loaded.clear()
        line = materials.argv(tmp_path / name, script, network, "AutoencoderKL", *cache, *more)
        if pictures:
            line.remove("--no_pictures")
        return train(line, script=script).losses

    first = losses("first")
    assert len(loaded) == 1  # to fill the cache
    assert losses("again") == first
    assert not loaded
    left = [hashes(tmp_path / name) for name in ("first", "again")]
    assert left[0] | {"run.json": ""} == left[1] | {"run.json": ""}

    drawn = losses("drawn", "--validation_steps", 1, steps, 2, pictures=True)
    assert len(loaded) == 2  # for pictures on the way, and at the end
    assert drawn == first
    (tmp_path / "cache").rename(tmp_path / "of all")
    losses("held", "--validation_split", 0.3, "--validation_loss_steps", 1)
    assert len(loaded) == 1  # to encode the others, and these each time


def test_a_hub_that_is_away_does_not_end_the_training(
    materials: Materials, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push = mock.Mock(side_effect=[HubError("upload failed (ConnectError)"), "address"])
    more = ("--push_to_hub", "--hub_model_id", "some/model", "--save_model_epochs", 1)
    more += ("--num_epochs", 2)
    line = materials.argv(tmp_path, UNCONDITIONAL_SCRIPT, "unet", "pixels", *more)
    with (
        mock.patch("diffusers_curriculum.training.publish.publisher.push", push),
        mock.patch("diffusers_curriculum.training.publish.publisher.prepare_repository"),
        caplog.at_level("WARNING"),
    ):
        record = train(line, script=UNCONDITIONAL_SCRIPT)
    assert len(record.steps) == 9  # two epochs of 18 samples in batches of 4
    assert push.call_count == 2  # after the first epoch, and at the end
    assert "upload failed (ConnectError) The training goes on." in caplog.text


def test_memory_that_runs_out_while_drawing_leaves_the_rest(
    materials: Materials, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    line = [word for word in argv(materials, tmp_path) if word != "--no_pictures"]
    with mock.patch.object(ImagePublisher, "_draw", full), caplog.at_level("WARNING"):
        train(line, script=CLASS_SCRIPT)
    assert "saved without pictures" in caplog.text
    assert {"model_index.json", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    assert checkpoint_names(tmp_path) == {"checkpoint-2", "checkpoint-4"}


# -- weights of continuous draws -------------------------------------------------------------------


@pytest.mark.parametrize("formulation", ["flow", "edm"])
def test_a_continuous_draw_has_the_weight_of_its_own_level(
    materials: Materials, tmp_path: Path, formulation: str
) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    loss_weights = Levels.loss_weights

    def noting(levels: Levels, drawn: Any) -> Any:
        weights: Any = loss_weights(levels, drawn)
        seen.append((drawn.log_snr.numpy(), weights.numpy()))
        return weights

    more = ("--formulation", formulation, "--loss_weighting", "unit_sample")
    line = materials.argv(tmp_path, CLASS_SCRIPT, "dit", "pixels", "--max_train_steps", 30, *more)
    with mock.patch.object(Levels, "loss_weights", noting):
        train(line, script=CLASS_SCRIPT)
    log_snr, weights = (np.concatenate(column) for column in zip(*seen, strict=True))
    power = np.exp(log_snr)
    # a weight of 1 on x0: divided by what an error of the target counts in x0
    counts = (1 + np.sqrt(power)) ** 2 if formulation == "flow" else power + 1 / 0.5**2
    assert len(np.unique(log_snr)) == len(log_snr) == 120
    assert np.allclose(weights, 1 / counts, rtol=1e-5)


def test_weights_of_a_whole_schedule_stay_those_of_the_cells() -> None:
    flow, weighting = FlowMatchEulerDiscreteScheduler(), ("--loss_weighting", "min_snr")
    own = ("--formulation", "flow", *weighting, "--loss_weighting_args", "normalise=true")
    args = parse_class_args(["--model_config", "DiT-S/2", "--dataset_name", "some/data", *own])
    levels = Levels.of(args, flow, flow, 0, continuous=True)
    drawn = levels.sampler.sample(8, step=0)
    assert drawn.log_snr is not None
    assert levels.weights is not None
    found: Any = levels.loss_weights(drawn)
    assert torch.equal(found, levels.weights[drawn.indices])


# -- power-function averages of a changed run ------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "kept"), [((0.1,), True), ((0.05,), False), ((0.1, 0.2), False), ((), False)]
)
def test_other_widths_are_refused_and_start_afresh_where_allowed(
    materials: Materials, tmp_path: Path, widths: tuple[float, ...], kept: bool
) -> None:
    train(argv(materials, tmp_path, "--power_ema", 0.1, "--use_ema"), script=CLASS_SCRIPT)
    more: tuple[object, ...] = ("--use_ema", "--resume_from_checkpoint", "latest")
    more += ("--max_train_steps", 5, *(("--power_ema", *widths) if widths else ()))
    if not kept:
        assert status(argv(materials, tmp_path, *more), CLASS_SCRIPT) == 2
        more += ("--allow_config_change", "ema")
    record = train(argv(materials, tmp_path, *more), script=CLASS_SCRIPT)
    assert record.numbers == [4]
    power = record.last.averages.power
    assert (power is None) == (not widths)
    if power is not None:
        assert tuple(power.gammas) == widths
        # the average of one step is the weights; of five steps it is not
        weights = next(iter(record.last.network.parameters()))
        fresh = torch.equal(power.averages[widths[0]][0], weights.detach())
        assert fresh != kept


def test_another_schedule_keeps_the_averages(materials: Materials, tmp_path: Path) -> None:
    train(argv(materials, tmp_path, "--power_ema", 0.1), script=CLASS_SCRIPT)
    more = ("--power_ema", 0.1, "--resume_from_checkpoint", "latest", "--max_train_steps", 5)
    more += ("--ddpm_beta_schedule", "squaredcos_cap_v2", "--allow_config_change", "schedule")
    record = train(argv(materials, tmp_path, *more), script=CLASS_SCRIPT)
    weights = next(iter(record.last.network.parameters()))
    assert not torch.equal(record.last.averages.power.averages[0.1][0], weights.detach())
