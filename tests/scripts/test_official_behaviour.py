"""What users of diffusers' train_text_to_image.py rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_curriculum import TimestepSampler
from diffusers_curriculum.training.publish.text_to_image import TextToImagePublisher
from tests.scripts.pipelines import draws_a_picture
from tests.scripts.small_runs import (
    RESOLUTION,
    Bench,
    Record,
    checkpoint_names,
    finite,
    hashes,
    train,
)

PROMPTS = ("picture number 3", "picture number 4")


# -- artefacts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """A run with official flags only, all of its pictures drawn."""
    folder = tmp_path_factory.mktemp("official") / "sd-pictures"
    more = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--use_ema", "--random_flip")
    more += ("--validation_prompts", *PROMPTS, "--validation_epochs", 1, "--allow_tf32")
    argv = bench.argv(folder, *more, batch=9)
    return folder, train(argv, pictures=True)


def test_the_pipeline_lies_in_the_output_folder(official: tuple[Path, Record]) -> None:
    folder, _ = official
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "text_encoder" / "model.safetensors").is_file()
    assert (folder / "scheduler" / "scheduler_config.json").is_file()
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionPipeline"
    )
    assert draws_a_picture(folder)


@pytest.mark.parametrize("step", [2, 4])
def test_checkpoints_hold_models_that_diffusers_loads(
    official: tuple[Path, Record], step: int
) -> None:
    folder, _ = official
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder=f"checkpoint-{step}/unet")
    path = str(folder / f"checkpoint-{step}" / "unet_ema")
    average = EMAModel.from_pretrained(path, UNet2DConditionModel)
    assert average.optimization_step == step
    shapes = [p.shape for p in unet.parameters()]
    assert [p.shape for p in average.shadow_params] == shapes
    pairs = zip(unet.parameters(), average.shadow_params, strict=True)
    assert not all(torch.equal(weight, mean) for weight, mean in pairs)
    assert checkpoint_names(folder) == {"checkpoint-2", "checkpoint-4"}


def test_the_average_is_exported_where_there_is_one(official: tuple[Path, Record]) -> None:
    folder, _ = official
    last = folder / "checkpoint-4"
    exported, name = folder / "unet", "diffusion_pytorch_model.safetensors"
    assert (exported / name).read_bytes() != (last / "unet" / name).read_bytes()
    ours = UNet2DConditionModel.from_pretrained(exported).state_dict()
    average = UNet2DConditionModel.from_pretrained(last / "unet_ema").state_dict()
    assert all(torch.equal(ours[key], average[key]) for key in average)


def test_training_changed_the_unet_and_nothing_else(
    bench: Bench, official: tuple[Path, Record]
) -> None:
    folder, _ = official
    before, after = hashes(bench.pipeline), hashes(folder)
    weights = [name for name in before if name.endswith(".safetensors")]
    assert len(weights) == 3
    changed = {name for name in weights if before[name] != after[name]}
    assert changed == {"unet/diffusion_pytorch_model.safetensors"}


def test_card_and_grid(official: tuple[Path, Record]) -> None:
    folder, _ = official
    card = (folder / "README.md").read_text()
    assert "sd-pictures" in card
    assert all(prompt in card for prompt in PROMPTS)
    with Image.open(folder / "val_imgs_grid.png") as grid:
        assert grid.size == (RESOLUTION, 2 * RESOLUTION)


def test_what_we_leave_beside_it(official: tuple[Path, Record]) -> None:
    folder, _ = official
    for name in ("timesteps.png", "loss_per_noise_level.png"):
        with Image.open(folder / name) as picture:
            assert picture.size > (400, 300)
    sampler = TimestepSampler.from_pretrained(str(folder))
    assert len(sampler.levels) == 1000
    assert torch.equal(sampler.probabilities(), torch.full((1000,), 1e-3, dtype=torch.float64))


def test_trackers_get_numbers_and_pictures(official: tuple[Path, Record]) -> None:
    folder, record = official
    events = EventAccumulator(str(folder / "logs" / "text2image-fine-tune"))
    events.Reload()
    tags = events.Tags()
    assert {"train_loss", "lr"} <= set(tags["scalars"])
    assert {"validation", "test"} <= {tag.partition("/")[0] for tag in tags["images"]}
    (mean,) = events.Scalars("train_loss")
    losses = [float.fromhex(loss) for loss in record.losses]
    assert mean.step == 4
    assert mean.value == pytest.approx(sum(losses) / 4)
    by_level = [tag for tag in tags["scalars"] if tag.startswith("loss_log_snr/")]
    counts = [tag for tag in tags["scalars"] if tag.startswith("count_log_snr/")]
    assert len(by_level) == len(counts) > 3
    assert sum(events.Scalars(tag)[0].value for tag in counts) == 4 * 9


def test_validation_comes_after_epochs(official: tuple[Path, Record]) -> None:
    folder, _ = official
    events = EventAccumulator(str(folder / "logs" / "text2image-fine-tune"))
    events.Reload()
    # two steps an epoch; after the last epoch the pictures are those of the end
    tags = events.Tags()["images"]
    steps = {e.step for tag in tags if tag.startswith("validation") for e in events.Images(tag)}
    assert steps == {2}


def test_validation_steps(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(TextToImagePublisher, "validate", lambda *args: seen.append(args[-1]))
    monkeypatch.setattr(TextToImagePublisher, "finish", lambda *args: None)
    more = ("--max_train_steps", 7, "--validation_prompts", "a", "--validation_steps", 2)
    train(bench.argv(tmp_path, *more))
    assert seen == [2, 4, 6]


def test_validation_changes_no_loss(bench: Bench, tmp_path: Path) -> None:
    more = ("--max_train_steps", 3, "--use_ema", "--curriculum", "difficulty")
    more += ("--curriculum_clusters", 2, "--curriculum_patience", 1, "--curriculum_max_share", 1)
    plain = train(bench.argv(tmp_path / "a", *more))
    pictures = ("--validation_prompts", "a", "--validation_steps", 1)
    watched = train(bench.argv(tmp_path / "b", *more, *pictures))
    assert watched.steps == plain.steps
    assert hashes(tmp_path / "a" / "unet") == hashes(tmp_path / "b" / "unet")


# -- official options ------------------------------------------------------------------------------


def test_snr_gamma_is_min_snr_bit_for_bit(bench: Bench, tmp_path: Path) -> None:
    names = {
        "gamma": ("--snr_gamma", 3),
        "named": ("--loss_weighting", "min_snr", "--loss_weighting_args", "gamma=3"),
        "plain": (),
    }
    losses = {
        name: train(bench.argv(tmp_path / name, *more, "--max_train_steps", 3)).losses
        for name, more in names.items()
    }
    assert losses["gamma"] == losses["named"] != losses["plain"]
    assert hashes(tmp_path / "gamma" / "unet") == hashes(tmp_path / "named" / "unet")


@pytest.mark.parametrize(
    "more",
    [
        ("--noise_offset", 0.1),
        ("--input_perturbation", 0.1),
        ("--dream_training", "--dream_detail_preservation", 2),
        ("--gradient_checkpointing",),
        ("--mixed_precision", "bf16"),
        ("--use_ema", "--offload_ema"),
        ("--use_ema", "--foreach_ema"),
        ("--scale_lr", "--lr_scheduler", "polynomial"),
        ("--center_crop", "--random_flip", "--image_interpolation_mode", "bicubic"),
        ("--dataloader_num_workers", 2),
        ("--max_grad_norm", "inf"),
    ],
    ids=lambda more: more[0][2:],
)
def test_an_official_option_trains(bench: Bench, tmp_path: Path, more: tuple[object, ...]) -> None:
    record = train(bench.argv(tmp_path, *more, "--max_train_steps", 2))
    assert record.numbers == [0, 1]
    assert finite(record)
    assert (tmp_path / "model_index.json").is_file()


@pytest.mark.parametrize("flag", ["--noise_offset", "--input_perturbation", "--dream_training"])
def test_an_option_has_an_effect(bench: Bench, tmp_path: Path, flag: str) -> None:
    value = () if flag == "--dream_training" else (0.5,)
    shared = ("--max_train_steps", 1)
    plain = train(bench.argv(tmp_path / "a", *shared))
    changed = train(bench.argv(tmp_path / "b", *shared, flag, *value))
    assert changed.losses != plain.losses
    assert changed.steps[0].indices == plain.steps[0].indices  # other draws stay


def test_what_changes_nothing_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    variants = {
        "plain": (),
        "workers": ("--dataloader_num_workers", 2),
        "checkpointing": ("--gradient_checkpointing",),
        "average": ("--use_ema",),
    }
    runs = {
        name: train(bench.argv(tmp_path / name, *more, "--max_train_steps", 3))
        for name, more in variants.items()
    }
    assert all(run.losses == runs["plain"].losses for run in runs.values())


def test_max_train_samples(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        more = ("--max_train_samples", 6, "--num_train_epochs", 1)
        record = train(bench.argv(tmp_path, *more))
    assert len(record.steps) == 3
    assert "examples = 6" in caplog.text


def test_a_run_without_a_seed_has_its_own(bench: Bench, tmp_path: Path) -> None:
    def losses(folder: Path) -> list[str]:
        argv = bench.argv(folder, "--max_train_steps", 1)
        place = argv.index("--seed")
        return train(argv[:place] + argv[place + 2 :]).losses

    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_the_same_seed_gives_the_same_run(bench: Bench, tmp_path: Path) -> None:
    first = train(bench.argv(tmp_path / "a", "--max_train_steps", 3))
    torch.manual_seed(12345)  # what the process drew before does not matter
    torch.rand(7)
    second = train(bench.argv(tmp_path / "b", "--max_train_steps", 3))
    assert first.steps == second.steps
    assert hashes(tmp_path / "a" / "unet") == hashes(tmp_path / "b" / "unet")
