"""Networks of grey images and of images with alpha: trained, drawn and measured like others."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_curriculum.training.data.dataset import ImageDataset
from diffusers_curriculum.training.publish.metrics_record import read_metrics
from tests.metrics.tiny_networks import save
from tests.scripts.image_runs import (
    CLASS_SCRIPT,
    NETWORKS,
    UNCONDITIONAL_SCRIPT,
    Materials,
    drawn,
    load_pipeline,
    make_materials,
)
from tests.scripts.small_runs import finite, train, write_json

GREY, ALPHA = 1, 4


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    torch.set_num_threads(1)
    made = make_materials(tmp_path_factory.mktemp("colours"))
    save("resnet", made.folder / "classifier")
    for file in (made.folder / "images").glob("*.png"):
        with Image.open(file) as image:
            image.putalpha(image.convert("L"))
            image.save(file)
    return made


@pytest.mark.parametrize("channels", [GREY, ALPHA])
@pytest.mark.parametrize(
    ("script", "network"), [(CLASS_SCRIPT, "dit"), (UNCONDITIONAL_SCRIPT, "unet")]
)
def test_a_network_of_other_colours(
    materials: Materials, tmp_path: Path, script: str, network: str, channels: int
) -> None:
    config = NETWORKS[network] | {"in_channels": channels}
    write_json(materials.folder / "colours.json", config)
    more = ["--max_train_steps", 2, "--eval_steps", 2, "--eval_samples", 4]
    more += ["--eval_metrics", "kid", "--eval_num_inference_steps", 2]
    more += ["--eval_feature_model", materials.folder / "classifier"]
    read, seen = ImageDataset.__getitem__, list[Any]()

    def noting(self: ImageDataset, position: int) -> Any:
        seen.append(read(self, position)["pixel_values"])
        return read(self, position)

    with mock.patch.object(ImageDataset, "__getitem__", noting):
        line = materials.argv(tmp_path / "out", script, "colours", "pixels", *more)
        assert finite(train(line, script=script))
    assert {tuple(pixels.shape) for pixels in seen} == {(channels, 8, 8)}
    if channels == ALPHA:  # alpha is the grey of the picture, and no longer all opaque
        assert min(float(pixels[3].min()) for pixels in seen) < 0.5
    assert set(read_metrics(tmp_path / "out" / "eval_metrics.jsonl")) == {2}
    made = drawn(load_pipeline(tmp_path / "out"), script == CLASS_SCRIPT)
    assert made.shape == (3, 8, 8, channels)


@pytest.mark.parametrize("channels", [GREY, ALPHA])
def test_its_pictures_are_drawn(materials: Materials, tmp_path: Path, channels: int) -> None:
    config = NETWORKS["unet"] | {"in_channels": channels}
    write_json(materials.folder / "colours.json", config)
    line = materials.argv(tmp_path, UNCONDITIONAL_SCRIPT, "colours", "pixels")
    line.remove("--no_pictures")
    more = ["--max_train_steps", "1", "--eval_batch_size", "2", "--ddpm_num_inference_steps", "2"]
    train([*line, *more], pictures=True, script=UNCONDITIONAL_SCRIPT)
    with Image.open(tmp_path / "val_imgs_grid.png") as grid:
        pixels = np.asarray(grid.convert("RGB"))
    assert pixels.size == 2 * 8 * 8 * 3
    assert (pixels[..., :1] == pixels).all() == (channels == GREY)
