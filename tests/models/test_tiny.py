"""The tiny pipeline is a real one: it saves, loads, runs, and its latents have unit scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_curriculum import cli
from diffusers_curriculum.models import tiny
from diffusers_curriculum.models.image_folder import TinyModelError, read_images
from diffusers_curriculum.models.tiny import (
    MINUSCULE,
    caption_tokenizer,
    encode_images,
    make_tiny_pipeline,
)

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 smooth random pictures, 20 x 24 pixels, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    rows = []
    for index in range(24):
        coarse = draw.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((20, 24), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"a smooth picture number {index % 10}"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a minuscule pipeline whose autoencoder was trained for a moment."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    make_tiny_pipeline(image_folder, folder, resolution=16, vae_steps=40, sizes=MINUSCULE)
    return folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = {part: next((folder / part).glob("*.safetensors")) for part in PARTS}
    return {
        f"{part}.{name}": tensor
        for part, file in files.items()
        for name, tensor in load_file(file).items()
    }


def test_saved_pipeline_loads_and_draws_pictures(trained: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a smooth picture", "anything else: 42!"]
    output: Any = pipeline(prompts, num_inference_steps=2, output_type="np")
    images: np.ndarray = output.images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()
    assert not np.array_equal(images[0], images[1])


def test_saved_pipeline_has_the_usual_parts_and_sds_schedule(trained: Path) -> None:
    index = json.loads((trained / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    assert index["feature_extractor"] == [None, None]
    config: Any = DDPMScheduler.load_config(trained, subfolder="scheduler")
    assert (config["beta_start"], config["beta_end"]) == (0.00085, 0.012)
    assert config["beta_schedule"] == "scaled_linear"
    assert config["clip_sample"] is False


def test_scaled_latents_have_unit_standard_deviation(trained: Path, image_folder: Path) -> None:
    vae = StableDiffusionPipeline.from_pretrained(trained).vae
    fresh = torch.Generator().manual_seed(99)
    images, _ = read_images(image_folder, 16, fresh)
    with torch.no_grad():
        latents = encode_images(vae, images, fresh) * vae.config.scaling_factor
    # 24 images x 4 x 8 x 8 values, drawn anew: the standard error of the std is below 0.01.
    assert float(latents.std()) == pytest.approx(1.0, abs=0.05)


def test_training_the_autoencoder_reduces_its_error(image_folder: Path, tmp_path: Path) -> None:
    errors = [
        make_tiny_pipeline(
            image_folder, tmp_path / str(steps), resolution=16, vae_steps=steps, sizes=MINUSCULE
        ).reconstruction_error
        for steps in (1, 60)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_the_seed_decides_all_weights(image_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_tiny_pipeline(
            image_folder, tmp_path / name, resolution=16, vae_steps=2, seed=seed, sizes=MINUSCULE
        )
    first, again, other = (_weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[key], again[key]) for key in first)
    for part in PARTS:
        assert any(not torch.equal(first[k], other[k]) for k in first if k.startswith(part))
    configs = [json.loads((tmp_path / name / "vae/config.json").read_text()) for name in "ab"]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"]


def test_global_random_state_is_untouched(image_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    numpy_before: Any = np.random.get_state()
    make_tiny_pipeline(image_folder, tmp_path / "x", resolution=16, vae_steps=2, sizes=MINUSCULE)
    assert torch.equal(torch.get_rng_state(), before)
    numpy_after: Any = np.random.get_state()
    assert np.array_equal(numpy_after[1], numpy_before[1])
    assert numpy_after[2:] == numpy_before[2:]


def test_result_does_not_depend_on_the_global_random_state(tmp_path: Path) -> None:
    for name, state in (("a", 1), ("b", 2)):
        torch.manual_seed(state)
        make_tiny_pipeline(None, tmp_path / name, resolution=16, vae_steps=0, sizes=MINUSCULE)
    first, second = _weights(tmp_path / "a"), _weights(tmp_path / "b")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_caption_words_are_single_tokens_and_any_text_can_be_encoded() -> None:
    tokenizer = caption_tokenizer(["a handwritten seven", "the digit 7"], max_length=16)
    assert len(tokenizer("a handwritten seven").input_ids) == 2 + 3
    assert len(tokenizer("The Digit 7").input_ids) == 2 + 3
    odd = "zebra, 12% \u00e9\u4e2d"
    ids = tokenizer(odd).input_ids
    assert len(ids) > 2 + 4
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_vocabulary_size_is_a_bound_and_favours_frequent_words() -> None:
    captions = ["common"] * 9 + ["extraordinarily", "uncharacteristically"]
    tokenizer = caption_tokenizer(captions, max_length=32, vocabulary_size=512 + 2 + 6)
    assert len(tokenizer) <= 520
    assert len(tokenizer("common").input_ids) == 2 + 1
    assert len(tokenizer("extraordinarily").input_ids) > 2 + 5


def test_captions_of_different_digits_stay_apart_in_the_text_encoder(tmp_path: Path) -> None:
    make_tiny_pipeline(None, tmp_path / "x", resolution=16, vae_steps=0, sizes=MINUSCULE)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "x")
    prompts = [f"the digit {digit}" for digit in range(10)]
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        states = pipeline.text_encoder(ids.input_ids)[0].flatten(1)
    # With CLIP's own 0.02 the nearest two are 0.08 norms apart, and conditioning learns slowly.
    assert float(torch.pdist(states).min() / states.norm(dim=1).mean()) > 0.15


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"resolution": 20}, "resolution=20"),
        ({"resolution": -16}, "resolution=-16"),
        ({"vae_steps": -1}, "vae_steps=-1"),
        ({"vae_steps": 5}, "vae_steps=5 needs images"),
        ({"prediction_type": "noise"}, "'noise'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"images_dir": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_bad_settings_are_refused_with_the_value(
    settings: dict[str, object], value: str, tmp_path: Path
) -> None:
    usual: dict[str, object] = {"images_dir": None, "resolution": 16, "vae_steps": 0}
    with pytest.raises(TinyModelError, match=value):
        make_tiny_pipeline(output_dir=tmp_path / "x", sizes=MINUSCULE, **(usual | settings))  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "x").exists()


def test_a_file_is_refused_as_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("kept")
    with pytest.raises(TinyModelError, match="taken' is a file"):
        make_tiny_pipeline(None, tmp_path / "taken", resolution=16, vae_steps=0, sizes=MINUSCULE)
    assert (tmp_path / "taken").read_text() == "kept"


@pytest.mark.parametrize("text", ['{"text": "no name"}', "not json"])
def test_broken_metadata_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "fine"}\n' + text)
    with pytest.raises(TinyModelError, match="line 2"):
        make_tiny_pipeline(tmp_path, tmp_path / "x", resolution=16, vae_steps=0, sizes=MINUSCULE)


def test_command_builds_a_pipeline(image_folder: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "tiny"
    words = ["make-tiny", "--train_data_dir", str(image_folder), "--output_dir", str(target)]
    assert cli.main([*words, "--resolution", "32", "--vae_steps", "1"]) == 0
    told = capsys.readouterr()
    assert "images=24" in told.out
    assert "reconstruction_mse=0." in told.out
    assert "Training the autoencoder: 100%" in told.err
    assert "1/1" in told.err
    assert StableDiffusionPipeline.from_pretrained(target).unet.config.sample_size == 4


def test_command_needs_no_images(tmp_path: Path, capsys) -> None:
    target = tmp_path / "tiny"
    assert cli.main(["make-tiny", "--output_dir", str(target)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{target}: images=0 scaling_factor=")
    assert "nan" not in told.out
    assert "Training the autoencoder" not in told.err
    assert StableDiffusionPipeline.from_pretrained(target).unet.config.sample_size == 4
    assert cli.main(["make-tiny", "--output_dir", str(target), "--vae_steps", "3"]) == 2
    assert "vae_steps=3 needs images" in capsys.readouterr().err


def test_images_train_the_autoencoder_by_default(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(tiny, "train_autoencoder", lambda vae, x, n, *more: asked.append(n) or 0.5)
    for folder in (image_folder, None):
        make_tiny_pipeline(folder, tmp_path / "x", resolution=16, sizes=MINUSCULE)
    assert asked == [tiny.VAE_STEPS, 0]


def test_command_answers_bad_input_with_status_2(tmp_path: Path, capsys) -> None:
    words = ["make-tiny", "--output_dir", str(tmp_path / "x"), "--vae_steps", "0"]
    assert cli.main([*words, "--train_data_dir", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
    assert cli.main([*words, "--resolution", "33"]) == 2
    assert "resolution=33" in capsys.readouterr().err
    assert cli.main([*words, "--resolution", "1000000000"]) == 2
    assert "resolution=1000000000 does not fit" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["make-tiny"])
    assert stop.value.code == 2
