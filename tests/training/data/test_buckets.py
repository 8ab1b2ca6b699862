"""Batches of one size each: full, the same for any number of processes, and nothing is lost."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusers_curriculum.training.data import image_sizes as sizes_module
from diffusers_curriculum.training.data.buckets import Buckets, even_sizes, filled_buckets
from diffusers_curriculum.training.data.dataset import ImageDataset, training_batches
from diffusers_curriculum.training.data.image_sizes import image_sizes
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.data.transforms import ImageTransform, covering_size
from diffusers_curriculum.training.errors import UsageError
from tests.training.command_lines import parse_args

SIZES = ((16, 16), (24, 16), (16, 24))


def bucketed(counts: list[int], batch: int, seed: int = 0) -> Buckets:
    of_row = np.random.default_rng(seed).permutation(np.repeat(range(len(counts)), counts))
    return Buckets(SIZES[: len(counts)], of_row, batch)


def global_batches(buckets: Buckets, steps: range, batch: int, accumulation: int, world: int):
    """The rows of each micro-batch of all processes together."""
    batches = []
    for step in steps:
        for micro in range(accumulation):
            rows = []
            for rank in range(world):
                shape = len(buckets.of_row), batch, accumulation, world
                plan = BatchPlan(*shape, rank, 3, buckets=buckets)
                rows += [plan.index(p) for p in plan.positions(step, micro)]
            batches.append(rows)
    return batches


@pytest.mark.parametrize("counts", [[7, 5, 4], [4, 29, 11], [13], [4, 4, 4]])
def test_batches_are_of_one_bucket_and_no_image_is_ahead_of_another(counts: list[int]) -> None:
    buckets = bucketed(counts, 4)
    seen: Counter[int] = Counter()
    total, before = sum(counts), dict.fromkeys(range(len(counts)), 0)
    for number, rows in enumerate(global_batches(buckets, range(3 * total), 2, 1, 2), 1):
        of = {int(buckets.of_row[row]) for row in rows}
        assert len(rows) == 4
        assert len(of) == 1
        seen.update(rows)
        before[of.pop()] += 4
        for bucket, own in enumerate(buckets.rows):
            times = [seen[int(row)] for row in own]
            assert max(times) - min(times) <= 1
            # each bucket has its share: what is left over of an epoch comes in the next
            epochs = number * 4 / total
            assert abs(before[bucket] - epochs * len(own)) <= len(own) + 8


def test_ten_interruptions_and_other_processes_see_the_same() -> None:
    buckets = bucketed([9, 17, 6], 4)
    whole = global_batches(buckets, range(40), 2, 2, 2)
    stops = sorted(random.Random(0).sample(range(1, 40), 10))
    parts = zip([0, *stops], [*stops, 40], strict=True)
    again = [b for a, z in parts for b in global_batches(buckets, range(a, z), 4, 2, 1)]
    assert again == whole
    assert len({tuple(rows) for rows in whole}) > 70


def test_an_image_goes_to_the_nearest_form_and_a_bucket_that_is_not_filled_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = np.array([(100, 100), (300, 200), (290, 200), (200, 310), (90, 100), (110, 100)])
    buckets = filled_buckets(images, SIZES, 1)
    assert [buckets.size_of(row) for row in range(6)] == [SIZES[k] for k in (0, 1, 1, 2, 0, 0)]
    with caplog.at_level("INFO"):
        fewer = filled_buckets(images, SIZES, 2)
    assert fewer.sizes == SIZES[:2]
    assert fewer.size_of(3) == SIZES[0]
    assert "1 of 6 images are cut to another size" in caplog.text
    # of one form the size decides
    two = filled_buckets(images, [(16, 16), (96, 96)], 1)
    assert {two.size_of(row) for row in (0, 4, 5)} == {(96, 96)}


@pytest.mark.parametrize(("resolution", "step"), [(1024, 8), (512, 16), (64, 8), (16, 2)])
def test_automatic_sizes_have_about_the_pixels_of_the_square(resolution: int, step: int) -> None:
    sizes = even_sizes(resolution, step)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes) >= 5
    for width, height in sizes:
        assert width % step == height % step == 0
        assert 0.5 <= width / height <= 2
        assert abs(np.log(width * height / resolution**2)) < 0.2


def test_what_is_cut_out_covers_its_bucket() -> None:
    assert covering_size(100, 50, (24, 16)) == (32, 16)
    assert covering_size(50, 100, (24, 16)) == (24, 48)
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    transform = ImageTransform(8).of_size((12, 6))
    assert transform(image, 0.5, 0.5, 1.0).shape == (3, 6, 12)
    crop = transform.crop_of((40, 10), 0.0, 0.99, 1.0)
    assert crop.size == (6, 12)
    assert crop.top_left == (0, 12)  # of 24 x 6


@pytest.fixture
def pictures(tmp_path: Path) -> Any:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(20, 20), (30, 20), (20, 30), (28, 20)] * 3):
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 3 else 1  # it lies on its side
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number:02}.png", exif=exif)
    return load_images(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))


def test_sizes_are_read_once(pictures: Any, tmp_path: Path, monkeypatch: Any) -> None:
    cache = str(tmp_path / "cache")
    sizes = image_sizes(pictures, "image", cache)
    assert sizes[:4].tolist() == [[20, 20], [30, 20], [20, 30], [20, 28]]
    monkeypatch.setattr(sizes_module, "decoded", None)  # would fail
    assert np.array_equal(image_sizes(pictures, "image", cache), sizes)


def test_a_batch_is_a_tensor_of_the_size_of_its_bucket(pictures: Any, tmp_path: Path) -> None:
    sizes = image_sizes(pictures, "image", str(tmp_path / "cache"))
    buckets = filled_buckets(sizes, SIZES, 2)
    plan = BatchPlan(len(pictures), 2, 1, 1, 0, 5, buckets=buckets)
    dataset = ImageDataset(pictures, plan, ImageTransform(16))
    shapes = Counter(
        tuple(batch["pixel_values"].shape) for batch in training_batches(dataset, plan, 0, 6)
    )
    assert {shape[:2] for shape in shapes} == {(2, 3)}
    assert shapes[2, 3, 16, 24] >= 2
    assert shapes[2, 3, 24, 16] >= 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--use_aspect_ratio_buckets --streaming", "--streaming does not go with"),
        ("--use_aspect_ratio_buckets --mask_from_alpha", "masks are cut to squares"),
        ("--use_aspect_ratio_buckets --compile full", "graphs for one size"),
        ("--use_aspect_ratio_buckets --aspect_ratio_buckets 512", "give heights and widths"),
        ("--use_aspect_ratio_buckets --aspect_ratio_buckets 0,8", "give heights and widths"),
        ("--aspect_ratio_buckets 8,8", "no effect without --use_aspect_ratio_buckets"),
    ],
)
def test_what_does_not_go_with_buckets_is_refused(words: str, told: str) -> None:
    line = ["--pretrained_model_name_or_path", "some/model", "--dataset_name", "some/data"]
    with pytest.raises(UsageError, match=told):
        parse_args([*line, *words.split()])


def test_sizes_are_given_as_height_and_width() -> None:
    line = ["--pretrained_model_name_or_path", "some/model", "--dataset_name", "some/data"]
    given = ["--use_aspect_ratio_buckets", "--aspect_ratio_buckets", "512,640; 640,512;"]
    assert parse_args([*line, *given]).aspect_ratio_buckets == ((512, 640), (640, 512))
