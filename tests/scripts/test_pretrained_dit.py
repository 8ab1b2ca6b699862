"""Fine-tuning a DiT as the public ones are: a learned variance, 1000 classes, a DiTPipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel

from diffusers_curriculum.models.networks import build_network
from diffusers_curriculum.pipelines import ClassConditionalPipeline
from tests.scripts.image_runs import (
    CLASS_SCRIPT,
    RESOLUTION,
    drawn,
    make_materials,
    make_pretrained_dit,
    state_of,
    write_class_folders,
)
from tests.scripts.small_runs import Record, finite, hashes, status, train, write_json

STEPS, STOPPED = 40, 17
NULL = 1000
LAST_LAYER = "proj_out_2.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("dit")
    make_materials(folder)
    for name, options in {"new": {}, "old": {"old": True}, "plain": {"outputs": 4}}.items():
        make_pretrained_dit(folder / name, folder / "AutoencoderKL", **options)
    return folder


def argv(folder: Path, output: Path, base: str, *more: object) -> list[str]:
    words: list[object] = [
        *("--pretrained_model_name_or_path", folder / base, "--output_dir", output, "--seed", 3),
        *("--train_data_dir", folder / "images", "--cache_dir", folder / "cache"),
        *("--resolution", RESOLUTION, "--train_batch_size", 4, "--learning_rate", 1e-2),
        *("--no_pictures", "--lr_warmup_steps", 0, "--max_train_steps", STEPS),
    ]
    return [str(word) for word in (*words, *more)]


def fine_tune(folder: Path, output: Path, base: str, *more: object) -> Record:
    return train(argv(folder, output, base, *more), script=CLASS_SCRIPT)


def weights_of(pipeline: Path) -> dict[str, torch.Tensor]:
    return state_of(DiTTransformer2DModel.from_pretrained(pipeline / "transformer"))


def halves(weight: torch.Tensor, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the last layer for the mean and for the variance: channels change fastest."""
    mean = torch.arange(len(weight)) % (2 * channels) < channels
    return weight[mean], weight[~mean]


def test_it_is_refused_until_the_variance_is_dealt_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(argv(folder, tmp_path, "new"), CLASS_SCRIPT) == 2
    told = capsys.readouterr().err
    assert "8 output channels" in told
    assert "give vlb (train it) or ignore (leave it)" in told
    assert status(argv(folder, tmp_path, "plain", "--learned_variance", "vlb"), CLASS_SCRIPT) == 2
    told = capsys.readouterr().err
    assert "4 output channels" in told
    assert "give none" in told


@pytest.mark.parametrize(("base", "variance"), [("new", "vlb"), ("old", "vlb"), ("old", "ignore")])
def test_it_trains_resumes_and_is_exported_as_it_was(
    folder: Path, tmp_path: Path, base: str, variance: str
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    more = ("--learned_variance", variance, "--use_ema", "--ema_decay", 0.5)
    record = fine_tune(folder, whole, base, *more, "--checkpointing_steps", STOPPED)
    losses = np.array([float.fromhex(loss) for loss in record.losses])
    assert finite(record)
    assert losses[-10:].mean() < losses[:10].mean()

    # Bit for bit
    shutil.copytree(whole / f"checkpoint-{STOPPED}", part / f"checkpoint-{STOPPED}")
    rest = fine_tune(folder, part, base, *more, "--resume_from_checkpoint", "latest")
    assert rest.steps == record.steps[STOPPED:]
    assert hashes(part / "transformer") == hashes(whole / "transformer") != {}

    # The export
    index = json.loads((whole / "model_index.json").read_text("utf-8"))
    assert index["_class_name"] == "DiTPipeline"
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["id2label"] == {"0": "0", "1": "1", "2": "2"}  # the classes of the data
    pipeline: Any = DiffusionPipeline.from_pretrained(whole)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is DiTPipeline
    assert pipeline.labels == {"0": 0, "1": 1, "2": 2}
    config = pipeline.transformer.config
    assert (config["in_channels"], config["out_channels"]) == (4, 8)
    assert config["num_embeds_ada_norm"] == 1000
    images = drawn(pipeline, conditional=True)
    assert np.isfinite(images).all()
    assert images.std() > 0

    # What was learned
    before, after = weights_of(folder / base), weights_of(whole)
    assert before.keys() == after.keys()
    mean, spread = halves(after[LAST_LAYER] - before[LAST_LAYER])
    assert bool(mean.any(1).all())
    assert bool(spread.any()) == (variance == "vlb")


def test_only_weight_decay_moves_an_ignored_variance(folder: Path, tmp_path: Path) -> None:
    more = ("--max_train_steps", 5, "--learned_variance", "ignore", "--adam_weight_decay", 0.1)
    fine_tune(folder, tmp_path, "new", *more, "--lr_scheduler", "constant")
    before, after = weights_of(folder / "new"), weights_of(tmp_path)
    expected = halves(before[LAST_LAYER])[1].double() * (1 - 1e-2 * 0.1) ** 5
    found = halves(after[LAST_LAYER])[1].double()
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)


# -- the null class --------------------------------------------------------------------------------


def label_rows(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1001, ...) the label embeddings of all blocks, by class."""
    tables = [weight for name, weight in weights.items() if "embedding_table" in name]
    assert tables
    return torch.cat(tables, dim=1)


@pytest.mark.parametrize("dropout", [0.3, 0.0])
def test_label_dropout_trains_the_null_class_of_dit_pipeline(
    folder: Path, tmp_path: Path, dropout: float
) -> None:
    config = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2}
    config |= {"attention_head_dim": 4, "num_layers": 2, "patch_size": 2}
    path = write_json(tmp_path / "dit.json", config)
    names = [f"class {number}" for number in range(10)]
    images = write_class_folders(tmp_path / "images", names, each=3)
    words: list[object] = [
        *("--model_config", path, "--output_dir", tmp_path / "run", "--seed", 3),
        *("--train_data_dir", images, "--cache_dir", folder / "cache"),
        *("--pretrained_vae_model_name_or_path", folder / "AutoencoderKL"),
        *("--resolution", RESOLUTION, "--train_batch_size", 8, "--learning_rate", 1e-2),
        *("--no_pictures", "--lr_warmup_steps", 0, "--max_train_steps", 30),
        *("--label_dropout", dropout),
    ]
    assert finite(train([str(word) for word in words], script=CLASS_SCRIPT))

    first = build_network(
        str(path), channels=4, sample_size=RESOLUTION // 2, num_classes=10, seed=3
    )
    moved = (label_rows(weights_of(tmp_path / "run")) - label_rows(state_of(first))).abs().amax(1)
    assert len(moved) == NULL + 1
    assert bool((moved[:10] > 0).all())
    assert not bool(moved[10:NULL].any())
    assert bool(moved[NULL] > 0) == (dropout > 0)
    if not dropout:
        return

    # Guided images of diffusers' pipeline are those of the network's own null class
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline) is DiTPipeline
    assert pipeline.get_label_ids(["class 7"]) == [7]
    own = ClassConditionalPipeline(
        pipeline.scheduler, transformer=pipeline.transformer, vae=pipeline.vae
    )

    def images_of(which: Any, scale: float) -> np.ndarray:
        which.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {"num_inference_steps": 5, "output_type": "np"}
        options |= {"generator": torch.Generator().manual_seed(5)}
        return which(class_labels=[0, 7, 9], guidance_scale=scale, **options).images

    guided, unguided = (images_of(pipeline, scale) for scale in (6.0, 1.0))
    assert np.allclose(guided, images_of(own, 6.0), atol=1e-5)
    assert np.abs(guided - unguided).max() > 1e-3
