"""Images with and without classes: where classes come from, and when they are dropped."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from scipy.stats import binomtest

from diffusers_curriculum.training.data.bad_samples import SKIPPED_FILE, usable_rows
from diffusers_curriculum.training.data.dataset import ImageDataset, training_batches
from diffusers_curriculum.training.data.decoding import decode_image
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.sources import load_images
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.storage.fingerprints import dataset_digest

Load = Callable[..., Dataset]
NAMES = ["zebra", "ant", "bee"]  # not in sorted order


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def call(folder: Path | None = None, column: str | None = "label", **options: Any) -> Dataset:
        return load_images(
            train_data_dir=None if folder is None else str(folder),
            label_column=column,
            cache_dir=str(tmp_path / "cache"),
            **options,
        )

    return call


def pictures(root: Path, names: Iterable[str]) -> Path:
    """Write a picture of its own colour for every name."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (number, 0, 0)).save(root / name)
    return root


def labelled(root: Path, labels: Iterable[Any]) -> Path:
    """Pictures with a metadata.jsonl that tells their classes."""
    rows = [{"file_name": f"{i:03d}.png", "label": label} for i, label in enumerate(labels)]
    pictures(root, [row["file_name"] for row in rows])
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def told(rows: Dataset, column: str = "label") -> list[str | None]:
    """The name of each row's class."""
    names = rows.features[column].names
    return [None if i is None or i < 0 else names[i] for i in rows[column]]


def saved(root: Path, labels: list[int], names: list[str] = NAMES) -> Dataset:
    """A data set whose classes are numbered in an order of its own."""
    files = [str(root / f"{i}.png") for i in range(len(labels))]
    pictures(root, [f"{i}.png" for i in range(len(labels))])
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": files, "label": labels}, features=features)


# -- where classes come from -----------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", [("", ""), ("pets/", "farm/")])
def test_folders_are_classes(tmp_path: Path, load: Load, prefixes: tuple[str, str]) -> None:
    names = [f"{prefixes[0]}dog/a.png", f"{prefixes[1]}cow/a.png", f"{prefixes[1]}cow/b.png"]
    rows = load(pictures(tmp_path / "images", names))
    assert rows.column_names == ["image", "label"]
    assert rows.features["label"].names == ["cow", "dog"]
    assert [Path(cell["path"]).parent.name for cell in rows["image"]] == told(rows)


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["dog", "cat", "dog", "ant"], ["ant", "cat", "dog"], [2, 1, 2, 0]),
        ([10, 2, 10, 7], ["2", "7", "10"], [2, 0, 2, 1]),  # numbers in the order of numbers
        (["10", "2", "7"], ["10", "2", "7"], [0, 1, 2]),
    ],
)
def test_metadata_tells_classes(
    tmp_path: Path, load: Load, labels: list[Any], names: list[str], numbers: list[int]
) -> None:
    rows = load(labelled(tmp_path / "images", labels))
    assert rows.features["label"].names == names
    assert list(rows["label"]) == numbers


def test_another_column_may_tell_them(tmp_path: Path, load: Load) -> None:
    root = labelled(tmp_path / "images", ["dog", "cat"])
    text = (root / "metadata.jsonl").read_text()
    (root / "metadata.jsonl").write_text(text.replace("label", "kind"))
    assert told(load(root, "kind"), "kind") == ["dog", "cat"]


@pytest.mark.parametrize("form", ["parquet", "disk", "splits"])
def test_a_saved_data_set_keeps_its_names_and_their_order(
    tmp_path: Path, load: Load, form: str
) -> None:
    data, place = saved(tmp_path / "images", [2, 0, 1, 1]), tmp_path / "saved"
    if form == "parquet":
        place.mkdir()
        data.to_parquet(str(place / "train.parquet"))
    else:
        (data if form == "disk" else DatasetDict({"train": data})).save_to_disk(str(place))
    rows = load(dataset_name=str(place))
    assert rows.features["label"].names == NAMES
    assert list(rows["label"]) == [2, 0, 1, 1]
    assert rows[0]["image"].keys() == {"bytes", "path"}  # undecoded


def test_what_a_saved_data_set_cannot_choose_is_refused(tmp_path: Path, load: Load) -> None:
    saved(tmp_path / "images", [0, 1]).save_to_disk(str(tmp_path / "saved"))
    for options in ({"dataset_config_name": "small"}, {"folder": tmp_path / "images"}):
        with pytest.raises(UsageError, match=r"saved' cannot be loaded.*drop --dataset_config"):
            load(dataset_name=str(tmp_path / "saved"), **options)


def test_a_choice_of_samples_keeps_all_classes(tmp_path: Path, load: Load) -> None:
    root = labelled(tmp_path / "images", range(12))
    rows = load(root, max_train_samples=3, seed=1)
    assert len(rows) == 3
    assert rows.features["label"].names == [str(number) for number in range(12)]
    assert [f"{int(name or -1):03d}" for name in told(rows)] == [
        Path(cell["path"]).stem for cell in rows["image"]
    ]


def test_images_need_no_metadata(tmp_path: Path, load: Load) -> None:
    flat = load(pictures(tmp_path / "flat", ["a.png", "b.png"]), None)
    assert (flat.column_names, len(flat)) == (["image"], 2)
    deep = load(pictures(tmp_path / "deep", ["a.png", "x/b.png", "x/y/c.png"]), None)
    assert (deep.column_names, len(deep)) == (["image"], 3)
    classes = load(pictures(tmp_path / "classes", ["x/a.png", "y/b.png"]), None)
    assert classes.column_names == ["image"]


@pytest.mark.parametrize(
    "names",
    [("a.png", "b.png"), ("x/a.png", "x/b.png"), ("x/a.png", "y/b.png", "c.png")],
    ids=["no folders", "one folder", "uneven depth"],
)
def test_a_folder_without_classes_is_explained(
    tmp_path: Path, load: Load, names: tuple[str, ...]
) -> None:
    root = pictures(tmp_path / "images", names)
    with pytest.raises(UsageError) as caught:
        load(root)
    message = str(caught.value)
    for part in ("--label_column 'label'", "Columns found: image.", repr(str(root)), "metadata"):
        assert part in message
    assert "one folder per class (two or more, all equally deep)" in message


def test_a_column_of_something_else_is_refused(tmp_path: Path, load: Load) -> None:
    cases = {"a": [[1], [2]], "b": [0.5, 1.0], "c": [True, False]}
    for name, labels in cases.items():
        with pytest.raises(UsageError, match=r"--label_column 'label' holds .*(classes|words)"):
            load(labelled(tmp_path / name, labels))
    with pytest.raises(UsageError, match=r"'kind' is not a column.*Columns found: image, label"):
        load(labelled(tmp_path / "d", [1, 2]), "kind")


# -- missing classes -------------------------------------------------------------------------------


def with_csv(root: Path) -> Path:
    """Whole numbers with one missing, which a reader of CSV takes for floats."""
    pictures(root, [f"{i}.png" for i in range(4)])
    with (root / "metadata.csv").open("w", newline="") as file:
        rows = [("file_name", "label"), ("0.png", 8), ("1.png", None), ("2.png", 3), ("3.png", 8)]
        csv.writer(file).writerows(rows)
    return root


MISSING: dict[str, tuple[list[Any], list[str]]] = {
    "words": (["b", None, "a", "b"], ["a", "b"]),
    "numbers": ([8, None, 3, 8], ["3", "8"]),
    "minus one": ([8, -1, 3, 8], ["3", "8"]),
}


@pytest.mark.parametrize("kind", [*MISSING, "csv", "saved"])
def test_a_missing_class_is_refused_or_left_out(tmp_path: Path, load: Load, kind: str) -> None:
    if kind == "saved":
        saved(tmp_path / "images", [1, -1, 0, 1]).save_to_disk(str(tmp_path / "saved"))
        rows, names = load(dataset_name=str(tmp_path / "saved")), NAMES
    elif kind == "csv":
        rows, names = load(with_csv(tmp_path / "images")), ["3", "8"]
    else:
        rows, names = load(labelled(tmp_path / "images", MISSING[kind][0])), MISSING[kind][1]
    assert rows.features["label"].names == names
    out = tmp_path / "out"
    out.mkdir()
    options: dict[str, Any] = {"label_column": "label", "output_dir": out, "resolution": 4}
    with pytest.raises(UsageError, match=r"1 of 4 samples(.|\n)*1\.png.*the class is missing"):
        usable_rows(rows, "image", None, progress=False, **options)
    kept = usable_rows(rows, "image", None, policy="skip", limit=0.5, progress=False, **options)
    assert list(kept["label"]) == [1, 0, 1]
    assert kept.features["label"].names == names
    entry = json.loads((out / SKIPPED_FILE).read_text())
    assert (entry["row"], entry["reason"]) == (1, "the class is missing")


# -- what tells the data apart ---------------------------------------------------------------------


def digest(rows: Dataset, root: Path, column: str | None = "label") -> str:
    return dataset_digest(rows, "image", column, str(root))


def test_the_digest_tells_classes_apart(tmp_path: Path, load: Load) -> None:
    root = tmp_path / "images"
    found = [digest(load(labelled(root, [1, 2, 2])), root)]
    found += [digest(load(root, None), root, None)]
    found += [digest(load(labelled(root, [1, 2, 1])), root)]
    assert len(set(found)) == 3
    again = labelled(tmp_path / "moved", [1, 2, 1])
    assert digest(load(again), again) == found[2]


def test_the_digest_tells_names_apart(tmp_path: Path) -> None:
    root = tmp_path / "images"
    undecoded = ImageFeature(decode=False)
    rows = [
        saved(root, [0, 1, 2], names).cast_column("image", undecoded)
        for names in (NAMES, ["horse", *NAMES[1:]])
    ]
    assert digest(rows[0], root) != digest(rows[1], root)


def test_the_digest_tells_selections_apart(tmp_path: Path, load: Load) -> None:
    # latents that are cached for one choice of images must not serve another
    root = labelled(tmp_path / "images", range(12))
    chosen = [load(root, max_train_samples=4, seed=seed) for seed in (0, 0, 1)]
    found = [digest(rows, root) for rows in chosen]
    assert list(chosen[0]["label"]) != list(chosen[2]["label"])
    assert found[0] == found[1] != found[2]


# -- dropping classes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Seven images that tell where a pixel came from, in three classes."""
    root = tmp_path_factory.mktemp("rows")
    labelled(root / "images", [i % 3 for i in range(7)])
    y, x = np.mgrid[:8, :14]
    for file in (root / "images").glob("*.png"):
        pixels = np.stack([x, y, 0 * x + int(file.stem)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(file)
    return load_images(
        train_data_dir=str(root / "images"), label_column="label", cache_dir=str(root / "cache")
    )


def sequence(
    rows: Dataset, dropout: float, batch: int = 4, world: int = 1, rank: int = 0, **more: Any
) -> ImageDataset:
    plan = BatchPlan(len(rows), batch, 1, world, rank, seed=11)
    options: dict[str, Any] = {"label_column": "label", "label_dropout": dropout, "null_label": 99}
    return ImageDataset(rows, plan, ImageTransform(8, random_flip=True), **(options | more))


def labels_of(dataset: ImageDataset, start: int, stop: int, workers: int = 0) -> list[int]:
    plan: Any = dataset.plan
    loaded = training_batches(dataset, plan, start, stop, num_workers=workers)
    return [label for batch in loaded for label in batch["label"].tolist()]


def test_a_position_gives_the_class_of_its_row(rows: Dataset) -> None:
    dataset = sequence(rows, 0.0)
    for position in range(20):
        sample, row = dataset[position], dataset.plan.index(position)
        assert sample["label"].dtype == torch.int64
        assert sample["label"].shape == ()
        assert int(sample["label"]) == rows[row]["label"] == row % 3
        blue = ((sample["pixel_values"][2] * 0.5 + 0.5) * 255).round()
        assert blue.unique().tolist() == [row]


def test_the_share_of_dropped_classes(rows: Dataset) -> None:
    found = labels_of(sequence(rows, 0.2), 0, 375)
    assert binomtest(found.count(99), 1500, 0.2).pvalue > 1e-3
    kept = labels_of(sequence(rows, 0.0), 0, 375)
    assert 99 not in kept
    assert all(a in (b, 99) for a, b in zip(found, kept, strict=True))
    counts = [
        sum(a == 99 and b == label for a, b in zip(found, kept, strict=True)) for label in range(3)
    ]
    shares = [count / kept.count(label) for label, count in enumerate(counts)]
    assert max(abs(share - 0.2) for share in shares) < 0.08  # no class is spared
    assert set(labels_of(sequence(rows, 1.0), 0, 60)) == {99}


def test_a_class_is_dropped_anew_in_every_epoch(rows: Dataset) -> None:
    dataset, dropped = sequence(rows, 0.5), {}
    for position in range(7 * 12):
        row = dataset.plan.index(position)
        dropped.setdefault(row, set()).add(int(dataset[position]["label"]) == 99)
    assert all(seen == {True, False} for seen in dropped.values())


def test_dropping_depends_on_the_position_alone(rows: Dataset) -> None:
    whole = labels_of(sequence(rows, 0.4), 0, 12)
    assert 0 < whole.count(99) < len(whole)
    assert labels_of(sequence(rows, 0.4), 0, 12, workers=2) == whole
    assert labels_of(sequence(rows, 0.4), 7, 12) == whole[28:]
    ranks = [labels_of(sequence(rows, 0.4, 2, 2, rank), 0, 12) for rank in (0, 1)]
    pairs = [[labels[i : i + 2] for i in range(0, 24, 2)] for labels in ranks]
    joined = [label for both in zip(*pairs, strict=True) for part in both for label in part]
    assert joined == whole


def test_dropping_does_not_change_crops_and_flips(rows: Dataset) -> None:
    variants = [sequence(rows, share) for share in (0.0, 0.5, 1.0)]
    variants.append(sequence(rows, 0.0, label_column=None))
    for position in range(30):
        pixels = [dataset[position]["pixel_values"] for dataset in variants]
        assert all(torch.equal(pixels[0], other) for other in pixels[1:])
    assert "label" not in variants[3][0]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_an_impossible_share_is_refused(rows: Dataset, share: float) -> None:
    with pytest.raises(UsageError, match=str(share)):
        sequence(rows, share)


def test_reading_a_class_does_not_read_the_image(
    rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cached:
        def read(self, row: int, u_crop: float, u_flip: float) -> tuple[torch.Tensor, None]:
            return torch.full((1,), float(row)), None

    dataset, read, whole = sequence(rows, 0.0, latents=Cached()), [], Dataset.__getitem__

    def noted(self: Dataset, key: Any) -> Any:
        read.extend(self.column_names)
        return whole(self, key)

    monkeypatch.setattr(Dataset, "__getitem__", noted)
    samples = [dataset[position] for position in range(8)]
    assert [int(sample["label"]) for sample in samples] == [
        int(sample["mean"]) % 3 for sample in samples
    ]
    assert set(read) == {"label"}


# -- how images are stored -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paths", "relative paths", "bytes", "structs", "path structs"])
@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_a_column_of_images_may_be_stored_in_any_way(
    tmp_path: Path, load: Load, form: str, kind: str
) -> None:
    place = tmp_path / "set"
    pictures(place / "files", [f"{i}.png" for i in range(3)])
    paths = [str(place / "files" / f"{i}.png") for i in range(3)]
    contents = [Path(path).read_bytes() for path in paths]
    cells: dict[str, list[Any]] = {
        "paths": paths,
        "relative paths": [f"files/{i}.png" for i in range(3)],
        "bytes": contents,
        "structs": [{"bytes": content, "path": None} for content in contents],
        "path structs": [{"path": path} for path in paths],
    }
    if form == "structs":
        cells[form][1] = {"bytes": None, "path": paths[1]}
    rows = Dataset.from_dict({"image": cells[form], "label": ["a", "b", None]})
    if kind == "disk":
        rows.save_to_disk(str(place / "saved"))
        if form == "relative paths":
            (place / "files").rename(place / "saved" / "files")
    else:
        rows.to_parquet(str(place / "train.parquet"))
    found = load(dataset_name=str(place / "saved" if kind == "disk" else place))
    assert found.features["image"] == ImageFeature(decode=False)
    assert told(found) == ["a", "b", None]
    images = [decode_image(cell) for cell in found["image"]]
    assert [image.getpixel((0, 0)) for image in images] == [(i, 0, 0) for i in range(3)]
    assert digest(found, place)


def test_captions_may_stand_in_text_files(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images", ["a.png", "b.jpg", "x/c.png"])
    (root / "a.txt").write_text("a red\n  bird\n", "utf-8")
    (root / "x" / "c.txt").write_text("\u00fcber", "utf-8")
    options: dict[str, Any] = {"caption_column": "text", "cache_dir": str(tmp_path / "cache")}
    rows = load_images(train_data_dir=str(root), **options)
    assert list(rows["text"]) == ["a red bird", None, "\u00fcber"]
    with pytest.raises(UsageError, match=r"1 of 3 samples(.|\n)*b\.jpg.*the caption is missing"):
        usable_rows(rows, "image", "text", output_dir=tmp_path, progress=False)
    (root / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"the caption '.*b\.txt' cannot be read as UTF-8"):
        load_images(train_data_dir=str(root), **options)


def test_a_column_of_words_is_none_of_images(tmp_path: Path, load: Load) -> None:
    Dataset.from_dict({"image": ["one", "two"], "label": [0, 1]}).save_to_disk(str(tmp_path / "s"))
    with pytest.raises(UsageError, match=r"--image_column 'image' holds texts, not images.*'one'"):
        load(dataset_name=str(tmp_path / "s"))
