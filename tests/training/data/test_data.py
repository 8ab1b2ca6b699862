"""Reading any position of the training sequence gives the same sample every time."""

from __future__ import annotations

import json
import random
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, chisquare

from diffusers_curriculum.training.data.dataset import ImageCaptionDataset, training_batches
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.data.transforms import ImageTransform, to_tensor
from diffusers_curriculum.training.errors import UsageError


class Letters:
    """A tokenizer of six letters: code points, cut and padded with zeros."""

    def __call__(self, texts):
        ids = [[ord(letter) for letter in text][:6] for text in texts]
        return {"input_ids": torch.tensor([each + [0] * (6 - len(each)) for each in ids])}


def text_of(input_ids: torch.Tensor) -> str:
    return "".join(chr(i) for i in input_ids.tolist() if i)


@pytest.fixture
def folder(tmp_path):
    """Two images that tell where a pixel came from (red = x, green = y): 14 x 8 and 8 x 12."""
    root = tmp_path / "images"
    root.mkdir()
    for name, (width, height) in {"wide.png": (14, 8), "tall.png": (8, 12)}.items():
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


@pytest.fixture
def rows(folder, tmp_path):
    phrasings = {"wide.png": ["a", "b", "c"], "tall.png": ["d", "e", "f"]}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in phrasings.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return load_images(
        caption_column="text", train_data_dir=str(folder), cache_dir=str(tmp_path / "cache")
    )


def sequence(rows, batch=4, world=1, rank=0, accumulation=1, dropout=0.0, **transform):
    plan = BatchPlan(len(rows), batch, accumulation, world, rank, seed=11)
    options = {"resolution": 8, "random_flip": True, **transform}
    return ImageCaptionDataset(
        rows, plan, Letters(), ImageTransform(**options), caption_dropout=dropout
    )


def batches(dataset, start, stop, **options):
    return list(training_batches(dataset, dataset.plan, start, stop, **options))


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(left, right, strict=True)
    )


def joined(*parts):
    return [{key: torch.cat([part[key] for part in parts]) for key in parts[0]}]


def test_a_sample_has_the_promised_shape(rows):
    sample = sequence(rows, resolution=16)[0]
    assert sample["pixel_values"].shape == (3, 16, 16)
    assert sample["pixel_values"].dtype == torch.float32
    assert sample["pixel_values"].abs().max() <= 1
    assert sample["input_ids"].shape == (6,)
    assert sample["input_ids"].dtype == torch.int64


def test_the_image_and_the_caption_of_a_position_belong_to_its_row(rows):
    dataset = sequence(rows, center_crop=True, random_flip=False)
    for position in range(12):
        cells = rows[dataset.plan.index(position)]
        image = Image.open(cells["image"]["path"])
        left, top = (image.width - 8) // 2, (image.height - 8) // 2
        expected = to_tensor(image.crop((left, top, left + 8, top + 8)))
        sample = dataset[position]
        assert torch.equal(sample["pixel_values"], expected)
        assert text_of(sample["input_ids"]) in cells["text"]


def test_workers_change_nothing(rows):
    here = batches(sequence(rows, accumulation=2), 0, 3)
    assert len(here) == 6
    assert same(here, batches(sequence(rows, accumulation=2), 0, 3, num_workers=2))


def test_starting_at_any_step_continues_the_run(rows):
    dataset = sequence(rows, batch=3, accumulation=2)
    whole = batches(dataset, 0, 5)
    for stop in range(6):
        assert same(whole[2 * stop :], batches(dataset, stop, 5))


def test_ranks_and_micro_batches_are_parts_of_the_same_global_batch(rows):
    one = batches(sequence(rows, batch=4), 2, 3)
    ranks = [batches(sequence(rows, batch=2, world=2, rank=rank), 2, 3)[0] for rank in (0, 1)]
    assert same(one, joined(*ranks))
    assert same(one, joined(*batches(sequence(rows, batch=1, accumulation=4), 2, 3)))


def global_draws():
    """The next number of each global generator: equal seeds and no draw between, equal numbers."""
    return torch.rand(4).tolist(), np.random.random_sample(4).tolist(), random.random()


def seed_globally(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def test_global_generators_are_neither_read_nor_changed(rows):
    def draw(seed):
        seed_globally(seed)
        expected = global_draws()
        seed_globally(seed)
        found = [batches(sequence(rows), 0, 2, num_workers=workers) for workers in (0, 1)]
        assert global_draws() == expected
        return found[0] + found[1]

    assert same(draw(0), draw(1))


def test_the_dataset_survives_pickling_for_spawned_workers(rows):
    dataset = sequence(rows)
    loads = ForkingPickler.loads  # pyright: ignore[reportAttributeAccessIssue]
    restored = loads(ForkingPickler.dumps(dataset))
    assert same([dataset[p] for p in range(6)], [restored[p] for p in range(6)])


def test_random_crops_flips_and_phrasings_are_uniform(rows):
    dataset = sequence(rows)
    offsets = {0: np.zeros(7, int), 1: np.zeros(5, int)}
    phrasings, flips, count = {}, 0, 2800
    for position in range(count):
        sample = dataset[position]
        red, green = ((sample["pixel_values"][:2] * 0.5 + 0.5) * 255).round().int()
        wide = text_of(sample["input_ids"]) in "abc"
        offsets[0 if wide else 1][int((red if wide else green).min())] += 1
        flips += int(red[0, 0] > red[0, -1])
        letter = text_of(sample["input_ids"])
        phrasings[letter] = phrasings.get(letter, 0) + 1
    assert sorted(phrasings) == list("abcdef")
    for counts in (offsets[0], offsets[1], list(phrasings.values())):
        assert chisquare(counts).pvalue > 1e-3
    assert binomtest(flips, count).pvalue > 1e-3


def test_caption_dropout_has_its_share_and_leaves_the_images_alone(rows):
    dropped, kept = sequence(rows, dropout=0.2), sequence(rows)
    captions = dict.fromkeys(["", *"abcdef"], 0)
    for position in range(1500):
        sample = dropped[position]
        captions[text_of(sample["input_ids"])] += 1
        if text_of(sample["input_ids"]):
            assert torch.equal(sample["input_ids"], kept[position]["input_ids"])
        if position < 50:
            assert torch.equal(sample["pixel_values"], kept[position]["pixel_values"])
    assert binomtest(captions.pop(""), 1500, 0.2).pvalue > 1e-3
    assert chisquare(list(captions.values())).pvalue > 1e-3  # dropout has no favourite phrasing
    assert {text_of(sequence(rows, dropout=1.0)[p]["input_ids"]) for p in range(9)} == {""}


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_an_impossible_caption_dropout_is_refused(rows, share):
    with pytest.raises(UsageError, match=str(share)):
        sequence(rows, dropout=share)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_during_training_is_named(rows, folder, workers):
    (folder / "wide.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"wide\.png.*cannot identify"):
        batches(sequence(rows), 0, 1, num_workers=workers)
