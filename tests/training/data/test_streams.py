"""Shards are read where they lie: each sample once in an epoch, whatever the processes, the workers
and the interruptions."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from diffusers_curriculum.training.data.checked_images import image_key
from diffusers_curriculum.training.data.dataset import ImageCaptionDataset, training_batches
from diffusers_curriculum.training.data.decoding import decode_image, upright_size
from diffusers_curriculum.training.data.plan import BatchPlan, Shards
from diffusers_curriculum.training.data.rows import read_rows
from diffusers_curriculum.training.data.shards import content_at, shards_of
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.captions import as_they_are
from tests.training.command_lines import parse_args
from tests.training.data.shard_files import picture, write_parquet, write_tar, write_tars

COUNTS = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 2, 1, 4, 3, 2, 7, 1, 2, 3, 1]  # of 20 shards


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tars"), COUNTS)


def streamed(place: Path | str, tmp_path: Path, **more: Any) -> Any:
    columns: dict[str, Any] = {
        "caption_column": "text",
        "cache_dir": str(tmp_path / "cache"),
    } | more
    return load_images(str(place), streaming=True, **columns)


def test_every_sample_once_per_epoch_after_ten_interruptions(tars: Path, tmp_path: Path) -> None:
    """20 shards, 2 processes with 2 workers each, stopped at 10 random steps."""
    rows, samples, epochs = streamed(tars, tmp_path), sum(COUNTS), 3
    assert len(rows) == samples
    shards = shards_of(rows, "image", 8)
    assert shards.counts == tuple(COUNTS)
    plans = [BatchPlan(samples, 3, 2, 2, rank, 5, shards=shards) for rank in range(2)]
    steps = plans[0].steps_for_epochs(epochs)
    transform = ImageTransform(8)
    stops = sorted(random.Random(1).sample(range(1, steps), 10))
    seen: list[list[str]] = []
    for start, end in zip([0, *stops], [*stops, steps], strict=True):
        of_ranks = []
        for plan in plans:
            dataset = ImageCaptionDataset(rows, plan, as_they_are, transform)
            of_ranks.append(list(training_batches(dataset, plan, start, end, num_workers=2)))
        for micro in zip(*of_ranks, strict=True):
            seen += [list(batch["caption"]) for batch in micro]
    order = [caption for batch in seen for caption in batch]
    told = {f"picture number {number}" for number in range(samples)}
    for epoch in range(epochs):
        own = order[epoch * samples : (epoch + 1) * samples]
        assert Counter(own) == Counter(told)
    assert order[:samples] != order[samples : 2 * samples]

    # one process sees the same, in one go
    alone = BatchPlan(samples, 12, 1, 1, 0, 5, shards=shards)
    assert [rows[alone.index(p)]["text"] for p in range(epochs * samples)] == order[
        : epochs * samples
    ]


def test_few_shards_are_read_at_a_time() -> None:
    shards = Shards((10,) * 50, buffer=20)
    plan = BatchPlan(500, 1, 1, 1, 0, 0, shards=shards)
    order = [plan.index(position) for position in range(500)]
    assert sorted(order) == [*range(500)]
    for first in range(0, 480, 20):
        assert len({row // 10 for row in order[first : first + 20]}) <= 5
    again = [plan.index(position) // 10 for position in range(500, 1000)]
    assert [row // 10 for row in order] != again
    # all are shuffled among one another where the buffer holds them
    whole = BatchPlan(500, 1, 1, 1, 0, 0, shards=Shards((10,) * 50, buffer=500))
    assert len({whole.index(position) // 10 for position in range(50)}) > 20


@pytest.mark.parametrize("write", [write_tars, write_parquet])
def test_images_and_texts_are_those_of_the_shards(write: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", [3, 4])
    rows = streamed(folder, tmp_path, label_column="label")
    assert list(rows["text"]) == [f"picture number {number}" for number in range(7)]
    assert list(rows["label"]) == [0, 1, 2, 0, 1, 2, 0]
    for number, cell in enumerate(rows["image"]):
        assert content_at(cell["path"]) == picture(number)
        assert decode_image(cell).size == upright_size(cell) == (8, 8)
    kept = image_key(rows[0]["image"])
    assert kept is not None
    assert kept != image_key(rows[1]["image"])

    # a selection is in the order of the shards, whose numbers follow
    some = streamed(folder, tmp_path, max_train_samples=5)
    numbers = [int(text.split()[-1]) for text in some["text"]]
    assert numbers == sorted(numbers)
    assert sum(shards_of(some, "image", 2).counts) == len(numbers) == 5


def test_a_place_names_the_file_and_the_sample(tars: Path, tmp_path: Path) -> None:
    path = streamed(tars, tmp_path)[0]["image"]["path"]
    assert path.startswith(str(tars / "0000.tar#"))
    assert path.endswith("/00000.png")
    parquet = write_parquet(tmp_path / "parquet", [5])
    rows = streamed(f"{parquet}/*.parquet", tmp_path)
    assert rows[3]["image"]["path"] == str(parquet / "0000.parquet#1/1.image")
    assert shards_of(rows, "image", 1).counts == (2, 2, 1)


def test_texts_stand_in_members_or_in_their_json(tars: Path, tmp_path: Path) -> None:
    pattern = f"{tars}/000[0-2].tar"
    for column, first in {"title": "title 0", "txt": "picture number 0", "cls": "0"}.items():
        told = {"caption_column": column, "image_column": "png"}
        if column == "cls":
            told = {"caption_column": None, "label_column": column}
        assert str(streamed(pattern, tmp_path, **told)[0][column]) == first


def test_shards_elsewhere_are_read_in_pieces(tars: Path, tmp_path: Path) -> None:
    elsewhere = fsspec.filesystem("memory")
    elsewhere.put(str(tars), "/elsewhere", recursive=True)
    try:
        rows = streamed("memory://elsewhere/*.tar", tmp_path)
        assert list(rows["text"]) == list(streamed(tars, tmp_path)["text"])
        assert content_at(rows[9]["image"]["path"]) == picture(9)
    finally:
        elsewhere.rm("/elsewhere", recursive=True)


def test_an_index_is_made_again_for_a_changed_shard_alone(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "shards", [2, 2])
    streamed(folder, tmp_path)
    store = tmp_path / "cache" / "shards"
    before = {path.name for path in store.iterdir()}
    streamed(folder, tmp_path)
    assert {path.name for path in store.iterdir()} == before
    write_tar(folder / "0001.tar", {"a.png": picture(0), "a.txt": b"another"})
    assert list(streamed(folder, tmp_path)["text"])[2:] == ["another"]
    assert len({path.name for path in store.iterdir()} - before) == 1


@pytest.mark.parametrize(
    ("members", "more", "told"),
    [
        ({"a.txt": b"x"}, {}, r"/a has no image: its files end in txt"),
        ({"a.png": b"x", "a.jpg": b"y"}, {}, r"several images \(png, jpg\)"),
        ({"a.png": b"x", "a.json": b"{}"}, {}, "no sample of .* has 'text': .* png, json"),
        ({"a.png": b"x", "a.txt": b"\xff"}, {}, "0.tar: .*utf-8.* cannot be loaded|decode"),
        ({"a.png": b"x", "a.txt": b"x"}, {"split": "test"}, "no split 'test'"),
    ],
)
def test_a_shard_that_cannot_be_used_is_named(
    members: dict[str, bytes], more: dict[str, Any], told: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "shards" / "0.tar", members)
    with pytest.raises(UsageError, match=told):
        streamed(tmp_path / "shards", tmp_path, **more)


def test_a_truncated_shard_is_told_by_the_sample(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "shards", [2])
    place = streamed(folder, tmp_path)[1]["image"]["path"]
    first = int(place.partition("#")[2].partition("+")[0])
    with (folder / "0000.tar").open("r+b") as shard:
        shard.truncate(first + 9)
    with pytest.raises(ValueError, match="the shard ends"):
        content_at(place)


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "csv"
    folder.mkdir()
    (folder / "a.csv").write_text("image,text\n1.png,x\n")
    with pytest.raises(UsageError, match=r"reads shards of one kind.*a\.csv"):
        streamed(folder, tmp_path)
    words = ["--pretrained_model_name_or_path", "some/model", "--streaming"]
    config = tmp_path / "data.json"
    config.write_text('[{"train_data_dir": "a"}]')
    with pytest.raises(UsageError, match="mixes several"):
        parse_args([*words, "--data_config", str(config)])
    with pytest.raises(UsageError, match="no such folder"):
        parse_args([*words, "--dataset_name", str(tmp_path / "none" / "*.tar")])


def test_a_share_is_kept_apart_and_images_are_not_read_before(tars: Path, tmp_path: Path) -> None:
    words = ["--pretrained_model_name_or_path", "some/model", "--streaming", "--dataset_name"]
    words += [str(tars), "--cache_dir", str(tmp_path / "cache")]
    args = parse_args([*words, "--validation_split", "0.2"])
    assert args.bad_samples == "off"
    assert parse_args([*words, "--bad_samples", "skip"]).bad_samples == "skip"
    training, held_out = read_rows(args, 0, caption_column="text")
    assert held_out is not None
    assert sorted([*training["text"], *held_out["text"]]) == sorted(
        f"picture number {number}" for number in range(sum(COUNTS))
    )
    assert sum(shards_of(training, "image", 9).counts) == len(training)


def test_grey_tensors_come_out_of_a_stream(tars: Path, tmp_path: Path) -> None:
    rows = streamed(tars, tmp_path)
    plan = BatchPlan(len(rows), 2, 1, 1, 0, 0, shards=shards_of(rows, "image", 100))
    batch = next(
        iter(
            training_batches(
                ImageCaptionDataset(rows, plan, as_they_are, ImageTransform(8)), plan, 0, 1
            )
        )
    )
    first = ImageTransform(8).decode({"path": None, "bytes": picture(plan.index(0))})
    torch.testing.assert_close(batch["pixel_values"][0], ImageTransform(8)(first, 0, 0, 1))
