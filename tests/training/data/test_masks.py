"""A mask lies over the very pixels of its sample, and one that cannot be used is told before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_curriculum.training.cache.latents import cache_latents
from diffusers_curriculum.training.data.bad_samples import usable_rows
from diffusers_curriculum.training.data.dataset import ImageDataset
from diffusers_curriculum.training.data.masks import Masks
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from tests.training.data.test_crops import cell

SIDE = 8
SIZES = ((14, 8), (8, 12), (8, 8), (26, 16))


def patterns() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(1, 256, (height, width), dtype=np.uint8) for width, height in SIZES]


def table(images: list[Image.Image], masks: list[Image.Image | None]) -> Dataset:
    kind = ImageFeature(decode=False)
    content = {
        "image": [cell(image) for image in images],
        "mask": [None if mask is None else cell(mask) for mask in masks],
        "text": ["a picture"] * len(images),
    }
    features = Features({"image": kind, "mask": kind, "text": Value("string")})
    return Dataset.from_dict(content, features=features)


@pytest.fixture
def rows() -> Dataset:
    """Images that show their masks, in colours and in alpha."""
    grey = [Image.fromarray(pattern) for pattern in patterns()]
    images = [Image.merge("RGBA", [each] * 4) for each in grey]
    return table(images, [*grey])


def dataset(rows: Any, column: str | None, weight: float, latents: Any, **options: Any) -> Any:
    transform = ImageTransform(SIDE, "box", **options)
    plan = BatchPlan(len(rows), 1, 1, 1, 0, seed=5)
    masks = Masks("image", column, transform, weight)
    return ImageDataset(rows, plan, transform, latents=latents, masks=masks)


class Pixels:
    """A space in which an image is its own latent."""

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        return pixels, None


@pytest.mark.parametrize("column", ["mask", None])
@pytest.mark.parametrize("cached", [False, True])
def test_a_mask_is_cut_and_mirrored_like_its_image(
    rows: Dataset, tmp_path: Path, column: str | None, cached: bool
) -> None:
    latents = None
    if cached:
        options: dict[str, Any] = {"batch_size": 4, "device": "cpu", "fingerprint": {}, "seed": 0}
        transform = ImageTransform(SIDE, "box", random_flip=True)
        latents = cache_latents(
            rows, Pixels(), transform, folder=tmp_path / "latents", crops=3, flip=True, **options
        )
    data = dataset(rows, column, 0.25, latents, random_flip=True)
    for position in range(40):
        sample = data[position]
        shown = (sample["mean" if cached else "pixel_values"][:1] + 1) / 2
        torch.testing.assert_close(sample["mask"], 0.25 + 0.75 * shown, rtol=0, atol=1e-6)


def test_an_image_without_a_mask_counts_as_a_whole(rows: Dataset) -> None:
    grey = [Image.fromarray(pattern) for pattern in patterns()]
    without = table(grey, [None] * len(grey))
    assert bool((dataset(without, "mask", 0.0, None)[0]["mask"] == 1).all())
    assert bool((dataset(without, None, 0.0, None)[0]["mask"] == 1).all())  # opaque throughout


def lit(size: tuple[int, int], left: int, right: int) -> Image.Image:
    """Black but for some columns of pixels."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[:, left:right] = 255
    return Image.fromarray(pixels)


def test_masks_that_cannot_be_used_are_told_before_training(tmp_path: Path) -> None:
    wide = Image.new("RGB", (24, 8))
    some, none, edge = lit((24, 8), 10, 14), lit((24, 8), 0, 0), lit((24, 8), 22, 24)
    odd = lit((8, 8), 0, 8)
    broken = {"path": None, "bytes": b"no image"}
    rows = table([wide] * 5, [some, none, edge, odd, some])
    rows = rows.map(lambda row, i: {"mask": broken if i == 4 else row["mask"]}, with_indices=True)

    def told(weight: float = 0.0, **options: Any) -> dict[int, str]:
        masks = Masks("image", "mask", ImageTransform(8, **options), weight)
        settings: dict[str, Any] = {"output_dir": tmp_path, "resolution": 8, "progress": False}
        with pytest.raises(UsageError) as refusal:
            usable_rows(rows, masks=masks, **settings)
        lines = str(refusal.value).splitlines()[1:]
        return {int(line.split()[1][:-1]): line for line in lines}

    found = told()
    assert {*found} == {0, 1, 2, 3, 4}  # of the first, a crop at either end sees nothing
    assert "a crop of it may hold nothing of its mask" in found[0]
    assert "--center_crop" in found[1]
    assert "--unmasked_weight" in found[1]
    assert "its mask has 8 x 8 pixels, and it 24 x 8" in found[3]
    assert "its mask cannot be read" in found[4]
    assert {*told(center_crop=True)} == {1, 2, 3, 4}
    assert {*told(weight=0.1)} == {3, 4}


def test_a_crop_of_nothing_is_refused_when_it_is_read() -> None:
    rows = table([Image.new("RGB", (24, 8))], [lit((24, 8), 22, 24)])
    data = dataset(rows, "mask", 0.0, None)
    with pytest.raises(UsageError, match="row 0: nothing of its mask lies in the crop"):
        list(map(data.__getitem__, range(20)))


def test_a_folder_names_masks_in_its_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "masks").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    lit((8, 8), 0, 4).save(folder / "masks" / "1.png")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "mask_file_name": "masks/1.png", "text": "a"}\n'
    )
    asked: dict[str, Any] = {"train_data_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
    rows = load_images(caption_column="text", mask_column="mask", **asked)
    mask = dataset(rows, "mask", 0.0, None)[0]["mask"]
    assert mask[0, 0].tolist() == [1.0] * 4 + [0.0] * 4
    with pytest.raises(UsageError, match="--mask_column 'text' holds texts, not images"):
        load_images(mask_column="text", **asked)
    with pytest.raises(UsageError, match="--mask_column 'other' is not a column"):
        load_images(mask_column="other", **asked)
