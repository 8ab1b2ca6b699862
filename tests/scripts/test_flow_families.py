"""train_text_to_image_flow_curriculum.py: captions and latents that are kept, and one caption for
all images; for the rest see test_families.py."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest

from diffusers_curriculum.training.errors import UsageError
from tests.scripts.small_runs import Bench, Record, finite, train, write_images
from tests.training.parts.families.flow_benches import RESOLUTION, pipeline_of

SCRIPT = "examples.text_to_image.train_text_to_image_flow_curriculum"
STEPS = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 6)


def argv(images: Path, family: str, output: Path, *more: object) -> list[str]:
    bench = Bench(pipeline_of(family), images, images.parent / "cache", SCRIPT, "transformer")
    small = ("--resolution", RESOLUTION, "--max_train_steps", STEPS, "--lr_warmup_steps", 0)
    return bench.argv(output, *small, "--use_ema", "--report_to", "none", *more)


def run(images: Path, family: str, output: Path, *more: object) -> Record:
    return train(argv(images, family, output, *more), script=SCRIPT)


@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_kept_captions_give_the_same_run(images: Path, tmp_path: Path, family: str) -> None:
    prompt = ("--validation_prompt", "a bird", "--validation_steps", 1)
    pictures = (*prompt, "--num_validation_images", 2, "--report_to", "tensorboard")
    kept = run(images, family, tmp_path / "kept", "--cache_text_embeddings", *pictures)
    plain = run(images, family, tmp_path / "plain", *pictures)
    assert kept.last.models.encoders == {}
    assert plain.last.models.encoders
    found, expected = ([float.fromhex(x) for x in record.losses] for record in (kept, plain))
    assert found == pytest.approx(expected, rel=1e-4)
    assert (tmp_path / "kept" / "val_imgs_grid.png").is_file()
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "stable-diffusion" not in card
    assert "pipeline(prompt='a bird')" in card.replace('"', "'")
    assert list((tmp_path / "kept" / "text_encoder").glob("*.safetensors"))


@pytest.mark.parametrize("family", ["flux2", "qwen_image"])
def test_kept_latents_give_the_same_run(images: Path, tmp_path: Path, family: str) -> None:
    kept = run(images, family, tmp_path / "kept", "--center_crop", "--cache_latents")
    plain = run(images, family, tmp_path / "plain", "--center_crop")
    found, expected = ([float.fromhex(x) for x in r.losses] for r in (kept, plain))
    assert found == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "kept" / "latents").is_dir()


def test_one_caption_for_all_images_of_a_folder(images: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(images, bare, ignore=shutil.ignore_patterns("*.jsonl"))
    base = argv(images, "z_image", tmp_path / "run", "--instance_data_dir", bare)
    at = base.index("--train_data_dir")
    told = [*base[:at], *base[at + 2 :], "--instance_prompt", "a photo of sks"]
    seen: list[list[str]] = []
    step = importlib.import_module(SCRIPT).training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            f"{SCRIPT}.training_step",
            lambda run, at, slots, batch: (
                seen.append(batch["caption"]),
                step(run, at, slots, batch),
            )[1],
        )
        assert finite(train(told, script=SCRIPT))
    assert seen == [["a photo of sks"] * 2] * STEPS
    refused = importlib.import_module(SCRIPT)
    with pytest.raises(UsageError, match="both name the images: drop one of the two"):
        refused.main([*told, "--train_data_dir", str(images)])
    with pytest.raises(UsageError, match="no effect without captions in the data"):
        refused.main([*told, "--caption_column", "text"])
