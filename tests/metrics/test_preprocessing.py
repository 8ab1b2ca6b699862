"""What networks are fed with, against PIL and against arithmetic on paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusers_curriculum.metrics.preprocessing import (
    DINOV2_PREPROCESSING,
    FeatureNetworkError,
    Preprocessing,
    preprocessing_from,
    read_preprocessing,
)

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
PLAIN: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def pictures(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


def by_pil(image: Tensor, size: tuple[int, int], resampling: Image.Resampling) -> Tensor:
    """Channel by channel in floating point: with bytes PIL rounds and clips after each pass."""
    planes = (Image.fromarray(plane.float().numpy()) for plane in image)
    resized = [np.array(plane.resize((size[1], size[0]), resampling)) for plane in planes]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255) / 255


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 30), (96, 64)])
def test_resizing_is_that_of_pil(name: str, size: tuple[int, int]) -> None:
    images = pictures(48, 56)
    made = Preprocessing((0.0,) * 3, (1.0,) * 3, size, filter=name)(images)
    expected = torch.stack([by_pil(image, size, FILTERS[name]) for image in images])
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_normalising() -> None:
    images = pictures(4, 4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    made = Preprocessing(mean, std)(images)
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(made[:, channel].double(), expected, rtol=0, atol=1e-6)


def test_floating_images_are_taken_as_they_are() -> None:
    images = pictures(4, 4)
    wanted = preprocessing_from(PLAIN | {"size": 8}, 3)
    torch.testing.assert_close(wanted(images.float() / 255), wanted(images))


def test_grey_networks_see_the_grey_of_pil() -> None:
    images = pictures(5, 6)
    made = Preprocessing((0.0,), (1.0,))(images)
    pil = [Image.fromarray(i.permute(1, 2, 0).numpy()).convert("L") for i in images]
    expected = torch.stack([torch.from_numpy(np.array(p)) for p in pil])[:, None].float() / 255
    torch.testing.assert_close(made, expected, rtol=0, atol=0.51 / 255)


@pytest.mark.parametrize(
    ("fields", "image", "fed"),
    [
        ({"size": {"height": 8, "width": 12}}, (20, 20), (8, 12)),
        ({"size": {"shortest_edge": 10}}, (20, 40), (10, 20)),
        ({"size": {"shortest_edge": 10}}, (45, 30), (15, 10)),
        ({"size": 8}, (20, 20), (8, 8)),
        ({"do_resize": False}, (20, 24), (20, 24)),
        (
            {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": 12},
            (32, 64),
            (12, 12),
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (300, 400), (224, 224)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (300, 400), (384, 384)),
    ],
)
def test_sizes_of_a_config(
    fields: dict[str, Any], image: tuple[int, int], fed: tuple[int, int]
) -> None:
    assert preprocessing_from(PLAIN | fields, 3)(pictures(*image)).shape[-2:] == fed


def test_convnext_resizes_to_more_and_keeps_the_middle() -> None:
    wanted = preprocessing_from(PLAIN | {"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 3)
    assert (wanted.size, wanted.crop) == (256, (224, 224))


def test_the_middle_is_kept() -> None:
    ramp = torch.arange(10, dtype=torch.uint8).expand(1, 3, 10, 10)
    made = Preprocessing((0.0,) * 3, (1 / 255,) * 3, crop=(2, 4))(ramp)
    assert made.shape == (1, 3, 2, 4)
    assert made[0, 0, 0].round().tolist() == [3, 4, 5, 6]


def test_dinov2_is_fed_as_in_the_paper() -> None:
    made = DINOV2_PREPROCESSING(pictures(30, 60))
    assert made.shape == (2, 3, 224, 224)
    assert DINOV2_PREPROCESSING.filter == "bicubic"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"longest_edge": 4}}, "shortest_edge"),
        ({"size": None}, "shortest_edge"),
        ({"size": 8, "resample": 1}, "resample is 1"),
        ({"size": 8, "image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"size": 8, "image_mean": [0.5]}, "3 channels"),
        ({"size": 8, "do_rescale": False}, "do_rescale"),
    ],
)
def test_what_is_not_known_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(PLAIN | fields))
    with pytest.raises(FeatureNetworkError, match=message):
        read_preprocessing(path, 3)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"size": 8}'])
def test_a_damaged_config_is_refused_by_its_path(text: str, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(text)
    with pytest.raises(FeatureNetworkError, match=r"preprocessor_config\.json cannot be followed"):
        read_preprocessing(path, 3)
