"""Image folders as they really are: links, splits, hidden and unreadable files. Nothing is left out
without a word."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_curriculum.models.image_files import list_folder
from diffusers_curriculum.training.data.folders import split_folders
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.errors import UsageError

Load = Callable[..., Dataset]


@pytest.fixture
def load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Load:
    caplog.set_level(logging.WARNING)

    def call(folder: Path | None = None, **options: Any) -> Dataset:
        root = None if folder is None else str(folder)
        return load_images(train_data_dir=root, cache_dir=str(tmp_path / "cache"), **options)

    return call


def pictures(root: Path, *names: str) -> Path:
    """Write a picture under each name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name, "PNG")
    return root


def describe(root: Path, names: Iterable[str]) -> Path:
    """Write captions of these files."""
    rows = ({"file_name": name, "text": f"about {name}"} for name in names)
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def names_of(rows: Dataset, root: Path) -> list[str]:
    """Of the files that are trained on, below a folder."""
    return [Path(cell["path"]).relative_to(root).as_posix() for cell in rows["image"]]


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_a_class_folder_may_be_a_link(tmp_path: Path, load: Load, flag: str) -> None:
    root = pictures(tmp_path / "images", "cat/a.png", "dog/a.png")
    (root / "bird").symlink_to(pictures(tmp_path / "elsewhere", "a.png", "b.png"))
    source = {"folder": root} if flag == "train_data_dir" else {"dataset_name": str(root)}
    rows = load(**source, label_column="label")
    assert rows.features["label"].names == ["bird", "cat", "dog"]
    assert names_of(rows, root) == ["bird/a.png", "bird/b.png", "cat/a.png", "dog/a.png"]
    assert list(rows["label"]) == [0, 0, 1, 2]


def test_metadata_may_name_files_of_a_linked_folder(
    tmp_path: Path, load: Load, caplog: Any
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "more").symlink_to(pictures(tmp_path / "elsewhere", "a.png", "b.png"))
    describe(root, ["more/a.png", "more/b.png"])
    rows = load(root, caption_column="text")
    assert list(rows["text"]) == ["about more/a.png", "about more/b.png"]
    assert caplog.text == ""
    (root / "metadata.jsonl").unlink()
    describe(tmp_path / "elsewhere", ["b.png"])  # behind the link
    assert list(load(root, caption_column="text")["text"]) == ["about b.png"]
    assert "1 of the 2 image files" in caplog.text


def test_each_folder_is_read_once_whatever_leads_to_it(
    tmp_path: Path, load: Load, caplog: Any
) -> None:
    root = pictures(tmp_path / "outer" / "images", "a/x.png", "b/y.png")
    pictures(tmp_path / "outer", "stranger.png")
    (root / "a" / "loop").symlink_to(root)
    (root / "also b").symlink_to(root / "b")
    (root / "b" / "up").symlink_to(tmp_path / "outer")
    (root / "one").symlink_to(pictures(tmp_path / "far", "z.png"))
    (root / "two").symlink_to(tmp_path / "far")
    assert names_of(load(root), root) == ["a/x.png", "b/y.png", "one/z.png"]
    (line,) = caplog.messages
    assert "'a/loop', 'also b', 'b/up', 'two'" in line


def test_the_folder_itself_may_be_a_link(tmp_path: Path, load: Load) -> None:
    real = pictures(tmp_path / "real [1]", "a.png")
    (tmp_path / "link").symlink_to(real)
    assert names_of(load(tmp_path / "link"), tmp_path / "link") == ["a.png"]


def test_the_order_without_links_is_that_of_datasets(tmp_path: Path) -> None:
    names = ("b.png", "a/2.png", "a-1.png", "a.png", "B.png", "a/10.png", "\u00fc.png", ".c.png")
    root = pictures(tmp_path / "images", *names)
    files, cache = {"train": str(root / "**")}, str(tmp_path / "cache")
    rows: Any = load_dataset("imagefolder", data_files=files, cache_dir=cache, split="train")
    cells = rows.cast_column("image", ImageFeature(decode=False))["image"]
    assert list_folder(root).images == [cell["path"] for cell in cells]


# -- splits ----------------------------------------------------------------------------------------

WORDS = ("crash-test.png", "train-station.png", "cat.png", "dev kit.png", "bus.png")


def test_split_words_in_file_names_mean_nothing(tmp_path: Path, load: Load) -> None:
    root = describe(pictures(tmp_path / "images", *WORDS), WORDS)
    for source in ({"folder": root}, {"dataset_name": str(root)}):
        assert sorted(names_of(load(**source, caption_column="text"), root)) == sorted(WORDS)


def test_folders_of_splits(tmp_path: Path, load: Load, caplog: Any) -> None:
    names = ("train/a/1.png", "train/b/2.png", "val/a/3.png", "test/a/4.png", "test/b/5.png")
    root = pictures(tmp_path / "images", *names)
    assert len(load(root, label_column="label")) == 5
    (line,) = caplog.messages
    assert "(train: 2, validation: 1, test: 2): all of their images are used" in line
    assert "--train_split" in line
    caplog.clear()
    rows = load(dataset_name=str(root), label_column="label")
    assert names_of(rows, root) == ["train/a/1.png", "train/b/2.png"]
    (line,) = caplog.messages
    assert "3 of the 5 image files" in line
    assert "other splits than 'train': 'test/a/4.png', 'test/b/5.png', 'val/a/3.png'" in line
    for source in ({"folder": root}, {"dataset_name": str(root)}):
        for word in ("val", "validation"):
            assert names_of(load(**source, split=word), root) == ["val/a/3.png"]
        with pytest.raises(UsageError, match=r"no split 'dev set'; it has: train, validation, tes"):
            load(**source, split="dev set")


def test_metadata_above_the_folders_of_splits(tmp_path: Path, load: Load) -> None:
    names = ("training/1.png", "val/2.png", "training/3.png")
    root = describe(pictures(tmp_path / "images", *names), names)
    rows = load(root, caption_column="text", split="train")
    assert list(rows["text"]) == ["about training/1.png", "about training/3.png"]


def test_a_folder_without_splits_is_the_training_split(tmp_path: Path, load: Load) -> None:
    root = pictures(tmp_path / "images", *WORDS)
    assert len(load(root, split="train")) == len(load(dataset_name=str(root))) == 5
    with pytest.raises(UsageError, match="has no split 'test'; it has: train"):
        load(root, split="test")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a.png", "bus/b.png"], []),  # classes
        (["train/a.png", "val/b.png", "c.png"], []),
        (["data/train_images/a.png", "data/val_images/b.png"], ["train", "validation"]),
        (["Training/a.png", "Test/x/b.png"], ["train", "test"]),
        (["a.png"], []),
        (["test/a/b.png"], ["test"]),
        (["constrained/a.png", "latest/b.png"], []),
    ],
)
def test_what_is_taken_for_splits(tmp_path: Path, names: list[str], splits: list[str]) -> None:
    found = split_folders(str(tmp_path), [str(tmp_path / name) for name in names])
    assert list(found) == splits


def test_other_data_files_without_a_split_are_named(
    tmp_path: Path, load: Load, caplog: Any
) -> None:
    cells = [{"path": None, "bytes": pictures(tmp_path, "a.png").joinpath("a.png").read_bytes()}]
    kind = Features({"image": ImageFeature(decode=False)})
    for name in ("train-station", "cats", "crash-test"):
        Dataset.from_dict({"image": cells}, features=kind).to_parquet(
            tmp_path / "set" / f"{name}.parquet"
        )
    assert len(load(dataset_name=str(tmp_path / "set"))) == 1
    (line,) = caplog.messages
    assert "1 of the 3 data files" in line
    assert line.endswith("(train, test) and are left out: 'cats.parquet'")
    assert len(load(dataset_name=str(tmp_path / "set"), split="test")) == 1
    with pytest.raises(UsageError, match=r"no split 'val'; it has: train, test.*--train_split"):
        load(dataset_name=str(tmp_path / "set"), split="val")


def test_pictures_beside_tables_are_no_data(tmp_path: Path, load: Load, caplog: Any) -> None:
    root = pictures(tmp_path / "set", "assets/a.png", "assets/b.png", "data/c.png")
    cells = [{"path": None, "bytes": (root / "data" / "c.png").read_bytes()}] * 5
    one = Dataset.from_dict({"image": cells}, Features({"image": ImageFeature(decode=False)}))
    (root / "data" / "c.png").unlink()
    one.to_parquet(root / "data" / "train-00000-of-00001.parquet")
    assert len(load(dataset_name=str(root))) == 5
    assert caplog.text == ""


# -- what is left out, and why ---------------------------------------------------------------------


def test_each_reason_is_told_once_with_its_count(tmp_path: Path, load: Load, caplog: Any) -> None:
    root = pictures(tmp_path / "images", "a.png", "b.PNG", ".hidden.png", ".d/x.png", "__y/z.png")
    for name in ("photo.cr2", "photo 2.CR2", "drawing.svg", "notes.txt", ".DS_Store"):
        (root / name).write_bytes(b"something")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    assert names_of(load(root), root) == ["a.png", "b.PNG"]
    told = "\n".join(caplog.messages)
    assert len(caplog.messages) == 4
    assert "3 of the 9 image files" in told
    assert "hidden (a dot begins their name" in told
    assert "'.d/x.png', '.hidden.png', '__y/z.png'" in told
    assert "2 of the 9 image files" in told
    assert ".cr2 files here (save them as PNG): 'photo 2.CR2', 'photo.cr2'" in told
    assert "links to nothing, or no plain files: 'gone.png'" in told
    assert ".svg files here (save them as PNG)" in told
    assert "metadata" not in told


def test_what_metadata_names_is_not_left_out(tmp_path: Path, load: Load, caplog: Any) -> None:
    names = ("a.png", ".hidden.png")
    root = describe(pictures(tmp_path / "images", *names), names)
    assert len(load(root, caption_column="text")) == 2
    assert caplog.text == ""


def test_a_folder_of_unreadable_pictures_tells_why(tmp_path: Path, load: Load, caplog: Any) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.cr2").write_bytes(b"something")
    with pytest.raises(UsageError, match=r"--train_data_dir .*images' has no images in it"):
        load(tmp_path / "images")
    assert "save them as PNG" in caplog.text


def test_avif_is_trained_on(tmp_path: Path, load: Load) -> None:
    root = pictures(tmp_path / "images", "a.png")
    Image.new("RGB", (16, 16)).save(root / "b.avif")
    assert names_of(load(root), root) == ["a.png", "b.avif"]
