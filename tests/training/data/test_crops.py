"""What a network is told of a crop is where its very pixels were, encoded now or before."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusers_curriculum.training.cache.filling import Processes
from diffusers_curriculum.training.cache.latents import cache_latents
from diffusers_curriculum.training.data.dataset import ImageDataset
from diffusers_curriculum.training.data.decoding import decode_image, upright_size
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.transforms import Crop, ImageTransform

SIDE = 8
SIZES = ((14, 8), (8, 12), (8, 8))


def cell(image: Image.Image, kind: str = "PNG", orientation: int = 1) -> dict[str, Any]:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif)
    return {"path": None, "bytes": buffer.getvalue()}


def places(width: int, height: int) -> Image.Image:
    """Every pixel says where it is: red = x, green = y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def corner(pixels: Tensor, width: int, flipped: bool) -> tuple[int, int]:
    """(y, x) of the upper left pixel of a sample in its source, mirrored if the sample is."""
    x, y, _ = (round(float(value)) for value in (pixels[:, 0, 0] + 1) * 127.5)
    return y, (width - 1 - x if flipped else x)


def dataset(latents: Any = None, **options: Any) -> ImageDataset:
    rows = Dataset.from_list([{"image": cell(places(*size)), "text": ""} for size in SIZES])
    plan = BatchPlan(len(rows), 1, 1, 1, 0, seed=5)
    transform = ImageTransform(SIDE, **options)
    return ImageDataset(rows, plan, transform, latents=latents, tell_crop=told)


def told(crop: Crop) -> dict[str, Tensor]:
    return {"crop": torch.tensor([*crop.original, *crop.top_left])}


@pytest.mark.parametrize("flip", [False, True])
def test_a_sample_tells_the_corner_of_its_pixels(flip: bool) -> None:
    data, seen = dataset(random_flip=flip), set()
    for position in range(60):
        sample = data[position]
        width, height = SIZES[data.plan.index(position)]
        pixels = sample["pixel_values"]
        flipped = bool(pixels[0, 0, 0] > pixels[0, 0, -1])
        expected = (height, width, *corner(pixels, width, flipped))
        assert tuple(sample["crop"].tolist()) == expected
        seen.add((expected, flipped))
    assert len({crop for crop, _ in seen}) > 8
    assert {flipped for _, flipped in seen} == ({False, True} if flip else {False})


def test_the_middle_is_told() -> None:
    data = dataset(center_crop=True)
    crops = {tuple(data[position]["crop"].tolist()) for position in range(9)}
    assert crops == {(8, 14, 0, 3), (12, 8, 2, 0), (8, 8, 0, 0)}


def test_of_a_resized_image_both_sizes_are_told() -> None:
    crop = ImageTransform(SIDE).crop_of((40, 16), 0.0, 0.99, 1.0)
    assert crop == Crop((16, 40), (0, 12), (SIDE, SIDE))


class Pixels:
    """A space in which images are their own latents."""

    def encode(self, pixels: Tensor) -> tuple[Tensor, None]:
        return pixels.clone(), None


@pytest.mark.parametrize(("crops", "options"), [(3, {"random_flip": True}), (1, {})])
def test_cached_latents_tell_the_crop_that_they_were_encoded_from(
    tmp_path: Path, crops: int, options: dict[str, Any]
) -> None:
    rows = dataset().rows
    cache = cache_latents(
        rows,
        Pixels(),
        ImageTransform(SIDE, **options),
        folder=tmp_path / "cache",
        crops=crops,
        flip=options.get("random_flip", False),
        seed=0,
        batch_size=2,
        device="cpu",
        fingerprint={},
        sizes=True,
        processes=Processes(progress=False),
    )
    data, seen = dataset(cache, **options), set()
    data.rows = rows.remove_columns("image")  # no image is opened any more
    for position in range(80):
        sample = data[position]
        width, height = SIZES[data.plan.index(position)]
        flipped = bool(sample["mean"][0, 0, 0] > sample["mean"][0, 0, -1])
        expected = (height, width, *corner(sample["mean"], width, flipped))
        assert tuple(sample["crop"].tolist()) == expected
        seen.add((expected, flipped))
    assert len(seen) > 2 * crops


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_head_of_a_file_tells_the_size_of_its_pixels(kind: str, orientation: int) -> None:
    stored = cell(places(14, 8), kind, orientation)
    assert upright_size(stored) == decode_image(stored).size


def test_a_size_that_the_head_does_not_tell_is_that_of_the_pixels() -> None:
    buffer, note = io.BytesIO(), PngInfo()
    note.add_text("said", "before")
    places(14, 8).save(buffer, "PNG", pnginfo=note)
    broken = buffer.getvalue().replace(b"before", b"behind")  # its checksum is wrong now
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(broken))
    assert upright_size({"path": None, "bytes": broken}) == (14, 8)
    with pytest.raises(ValueError, match="there is no image"):
        upright_size({"path": None, "bytes": None})
