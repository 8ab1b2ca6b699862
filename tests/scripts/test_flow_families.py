"""train_text_to_image_flow_curriculum.py over families and laws: it trains, checkpoints, resumes
bit for bit, and leaves what plain diffusers draws the same pictures with."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffusers_curriculum.training.errors import UsageError
from tests.scripts.small_runs import Bench, Record, finite, hashes, train, write_images
from tests.training.parts.families.flow_benches import FLOWS, RESOLUTION, pipeline_of

SCRIPT = "examples.text_to_image.train_text_to_image_flow_curriculum"
LAWS = {
    "uniform": (),
    "laplace": ("--timestep_sampler", "laplace"),
    "curriculum": (
        *("--curriculum", "difficulty", "--curriculum_clusters", 4),
        *("--curriculum_pacing", "fixed", "--curriculum_stage_steps", 1),
        *("--curriculum_max_share", 9),
    ),
}
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


def drawn(pipeline: Any) -> torch.Tensor:
    """Two steps from the noise of a seed."""
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": RESOLUTION, "width": RESOLUTION, "num_inference_steps": 2}
    noise = torch.Generator().manual_seed(0)
    shown = pipeline(prompt="picture number 1", generator=noise, output_type="pt", **size)
    return shown.images


def same_picture(saved: Any, memory: Any) -> None:
    """But for the last bits: where weights lie in memory may change those of a product."""
    torch.testing.assert_close(drawn(saved), drawn(memory), rtol=0, atol=1e-5)


def check(images: Path, family: str, folder: Path, *law: object) -> None:
    whole = run(images, family, folder / "whole", *law)
    assert whole.numbers == [*range(STEPS)]
    assert finite(whole)

    # stopped and resumed: the same losses, the same bits in all files of the pipeline
    output = folder / "parts"
    run(images, family, output, *law, "--checkpointing_steps", 1, "--max_train_steps", 1)
    rest = run(images, family, output, *law, "--resume_from_checkpoint", "latest")
    assert rest.losses == whole.losses[1:]
    left, told = hashes(folder / "whole"), ("run.json", "checkpoint-")
    made = {name: each for name, each in hashes(output).items() if not name.startswith(told)}
    assert made == {name: each for name, each in left.items() if not name.startswith(told)}
    assert "transformer/diffusion_pytorch_model.safetensors" in made

    # what is left loads in diffusers, and draws as the models in memory do
    kind = getattr(diffusers, FLOWS[family].pipeline)
    saved = diffusers.DiffusionPipeline.from_pretrained(folder / "whole")
    assert type(saved) is kind
    averages = whole.last.averages
    with averages.shown():
        memory = FLOWS[family].pipeline_of(
            whole.last.models, averages.network.eval(), whole.last.levels.inference
        )
        same_picture(saved, memory)
        base = kind.from_pretrained(pipeline_of(family))
        assert not torch.equal(drawn(base), drawn(saved))  # it has learned something


@pytest.mark.parametrize(("family", "law"), [*zip(FLOWS, [*LAWS] * len(FLOWS), strict=False)])
def test_each_family(images: Path, tmp_path: Path, family: str, law: str) -> None:
    check(images, family, tmp_path, *LAWS[law])


@pytest.mark.reliability
@pytest.mark.parametrize("family", FLOWS)
@pytest.mark.parametrize("law", LAWS)
def test_every_family_and_law(images: Path, tmp_path: Path, family: str, law: str) -> None:
    check(images, family, tmp_path, *LAWS[law])


# -- adapters --------------------------------------------------------------------------------------


def check_adapter(images: Path, family: str, folder: Path, *law: object) -> None:
    adapted = ("--use_lora", "--lora_alpha", 2, *law)
    whole = run(images, family, folder / "whole", *adapted)
    assert finite(whole)
    output = folder / "parts"
    run(images, family, output, *adapted, "--checkpointing_steps", 1, "--max_train_steps", 1)
    rest = run(images, family, output, *adapted, "--resume_from_checkpoint", "latest")
    assert rest.losses == whole.losses[1:]
    name = "pytorch_lora_weights.safetensors"
    assert (output / name).read_bytes() == (folder / "whole" / name).read_bytes()

    # the base with the saved adapter draws as the models in memory do
    saved = diffusers.DiffusionPipeline.from_pretrained(pipeline_of(family))
    before = drawn(saved)
    saved.load_lora_weights(folder / "whole")
    averages, models = whole.last.averages, whole.last.models
    with averages.shown():
        memory = FLOWS[family].pipeline_of(
            models, models.network.eval(), whole.last.levels.inference
        )
        same_picture(saved, memory)
    assert not torch.equal(before, drawn(saved))


@pytest.mark.parametrize(("family", "law"), [*zip(FLOWS, [*LAWS] * len(FLOWS), strict=False)])
def test_an_adapter_in_each_family(images: Path, tmp_path: Path, family: str, law: str) -> None:
    pytest.importorskip("peft")
    check_adapter(images, family, tmp_path, *LAWS[law])


@pytest.mark.reliability
@pytest.mark.parametrize("family", FLOWS)
@pytest.mark.parametrize("law", LAWS)
def test_an_adapter_in_every_family_by_every_law(
    images: Path, tmp_path: Path, family: str, law: str
) -> None:
    pytest.importorskip("peft")
    check_adapter(images, family, tmp_path, *LAWS[law])


# -- captions and pictures -------------------------------------------------------------------------


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
