"""What is kept apart is the same for every seed, and no image of it is trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_curriculum.training.data.rows import Rows, read_rows
from diffusers_curriculum.training.errors import UsageError
from tests.training.command_lines import parse_args, parse_class_args


def pictures(root: Path, names: Iterable[str]) -> Path:
    """A picture and a caption under each name; names may come twice."""
    entries = [{"file_name": name, "text": f"about {name} {i}"} for i, name in enumerate(names)]
    for entry in entries:
        (root / entry["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / entry["file_name"])
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return root


def read(tmp_path: Path, *flags: object, seed: int = 0) -> Rows:
    words = ["--pretrained_model_name_or_path", "some/model", *map(str, flags)]
    args = parse_args([*words, "--cache_dir", str(tmp_path / "cache")])
    return read_rows(args, seed, caption_column="text")


def names_of(rows: Dataset | None) -> list[str]:
    return [] if rows is None else [Path(cell["path"]).name for cell in rows["image"]]


def numbered(count: int) -> list[str]:
    return [f"{i:02d}.png" for i in range(count)]


def test_without_the_flags_all_are_trained_on(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images", numbered(5))
    rows = read(tmp_path, "--train_data_dir", root)
    assert names_of(rows.training) == numbered(5)
    assert rows.held_out is None


def test_a_share_is_kept_apart_whatever_the_seed(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images", numbered(40))
    flags = ("--train_data_dir", root, "--validation_split", 0.25)
    first, other = (read(tmp_path, *flags, seed=seed) for seed in (0, 1))
    held_out = names_of(first.held_out)
    assert held_out == names_of(other.held_out) == sorted(held_out)
    assert len(held_out) == 10
    assert held_out not in (numbered(40)[:10], numbered(40)[-10:])
    assert sorted([*names_of(first.training), *held_out]) == numbered(40)
    few = [read(tmp_path, *flags, "--max_train_samples", 8, seed=seed) for seed in (0, 1)]
    assert names_of(few[0].training) != names_of(few[1].training)
    assert not {*names_of(few[0].training), *names_of(few[1].training)} & {*held_out}
    assert names_of(few[0].held_out) == held_out


def test_no_phrasing_of_an_image_that_is_kept_apart_is_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    root = pictures(tmp_path / "images", [name for name in numbered(20) for _ in range(2)])
    rows = read(tmp_path, "--train_data_dir", root, "--validation_split", 0.2)
    training, held_out = ({*names_of(part)} for part in rows)
    assert not training & held_out
    assert training | held_out == {*numbered(20)}
    left_out = 40 - len(rows.training) - 8
    assert left_out > 0
    assert f"{left_out} samples are not trained on" in caplog.text


def test_a_folder_in_that_of_the_training_is_kept_apart(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images", [*numbered(4), "held/04.png", "held/05.png"])
    pictures(root / "held", ["04.png", "05.png"])
    link = tmp_path / "link"
    link.symlink_to(root / "held")
    rows = read(tmp_path, "--train_data_dir", root, "--validation_data_dir", link)
    assert names_of(rows.training) == numbered(4)
    assert names_of(rows.held_out) == ["04.png", "05.png"]
    with pytest.raises(UsageError, match="nothing is left to train on"):
        read(tmp_path, "--train_data_dir", root / "held", "--validation_data_dir", root)


def test_a_split_by_its_name(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for split in ("train", "val"):
        pictures(root / split, [f"{split}-{i}.png" for i in range(3)])
    rows = read(tmp_path, "--train_data_dir", root, "--validation_split", "validation")
    assert [*map(names_of, rows)] == [[f"{s}-{i}.png" for i in range(3)] for s in ("train", "val")]
    with pytest.raises(UsageError, match=r"no split 'test'.*Choose one with --validation_split"):
        read(tmp_path, "--train_data_dir", root, "--validation_split", "test")


def test_a_split_of_a_table_whose_images_have_no_files(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images", ["0.png"])
    cell = {"path": "0.png", "bytes": (root / "0.png").read_bytes()}
    features = Features({"image": ImageFeature(decode=False), "text": Value("string")})

    def table(count: int) -> Dataset:
        content = {"image": [cell] * count, "text": ["one"] * count}
        return Dataset.from_dict(content, features=features)

    DatasetDict({"train": table(3), "test": table(2)}).save_to_disk(tmp_path / "saved")
    rows = read(tmp_path, "--dataset_name", tmp_path / "saved", "--validation_split", "test")
    assert [len(part or ()) for part in rows] == [3, 2]


def classes(tmp_path: Path, training: Sequence[str], held_out: Sequence[str]) -> Rows:
    for folder, names in (("train", training), ("held", held_out)):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / folder / name / f"{folder}.png")
    words = ["--model_config", "DiT-S/2", "--train_data_dir", str(tmp_path / "train")]
    words += ["--validation_data_dir", str(tmp_path / "held"), "--cache_dir", str(tmp_path / "c")]
    return read_rows(parse_class_args(words), 0, label_column="label")


def test_classes_have_the_numbers_that_they_are_trained_with(tmp_path: Path) -> None:
    rows = classes(tmp_path, ["ant", "bee", "zebra"], ["bee", "zebra"])
    assert rows.held_out is not None
    assert [*rows.held_out["label"]] == [1, 2]
    assert rows.held_out.features["label"].names == ["ant", "bee", "zebra"]
    with pytest.raises(UsageError, match=r"'yak' is a class of the samples that are kept apart"):
        classes(tmp_path / "other", ["ant", "bee"], ["ant", "yak"])


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_without_samples_is_refused(tmp_path: Path, share: float) -> None:
    root = pictures(tmp_path / "images", numbered(5))
    with pytest.raises(UsageError, match=rf"--validation_split is {share}"):
        read(tmp_path, "--train_data_dir", root, "--validation_split", share)
