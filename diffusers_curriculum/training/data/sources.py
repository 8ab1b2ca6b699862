"""Where training images come from: the Hub, a local data set, or a folder of images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk

from diffusers_curriculum.training.data.checks import describe
from diffusers_curriculum.training.data.columns import (
    check_caption_column,
    check_image_column,
    check_label_column,
    class_value,
    holds_paths,
)
from diffusers_curriculum.training.data.folders import (
    Source,
    is_image_folder,
    no_such_split,
    read_folder,
    warn_of_unread_files,
    with_texts,
)
from diffusers_curriculum.training.data.plan import chosen_rows
from diffusers_curriculum.training.data.streams import Columns, read_shards
from diffusers_curriculum.training.errors import UsageError

_SAVED = ("state.json", "dataset_dict.json")  # of save_to_disk: a data set, or several splits


def load_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    *,
    split: str | None = None,
    cache_dir: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str | None = None,
    mask_column: str | None = None,
    max_train_samples: int | None = None,
    seed: int = 0,
    streaming: bool = False,
    folder_flag: str = "--train_data_dir",
    split_flag: str = "--train_split",
) -> Dataset:
    """Load a split from the Hub, a local path or an image folder, images undecoded.

    A local folder is read with all folders that links in it lead to; what is left out is logged.

    Args:
        dataset_name: as `datasets.load_dataset` takes it, or a folder of `save_to_disk`; None reads
            `train_data_dir` as an image folder with a metadata.jsonl or metadata.csv, or one whose
            sub-folders are the classes.
        split: of the data set; None is "train", and of `train_data_dir` everything. In a folder of
            images, folders called after splits are splits, and names of files mean nothing.
        image_column: column of images, or of their paths, of bytes, or of {"path", "bytes"}.
        caption_column: column of captions, of an image folder without it those in a text file
            beside each image, such as 1.txt beside 1.png; None leaves them out.
        label_column: column of classes, of numbers or words; None leaves classes out.
        mask_column: column of masks, like that of images; None leaves them out.
        max_train_samples: keep this many samples, chosen by a shuffle with `seed`.
        streaming: read tar or Parquet files where they lie; cells of images are places in them.
        folder_flag, split_flag: what messages call `train_data_dir` and `split`.

    Returns:
        The columns asked for, classes as `ClassLabel`; images and masks are {"path", "bytes"}.

    Raises:
        UsageError: nothing to load, not loadable, empty, or without these columns.
    """
    _check_most(max_train_samples)
    place = dataset_name, dataset_config_name, train_data_dir
    images = {image_column: "--image_column"}
    images |= {} if mask_column is None else {mask_column: "--mask_column"}
    texts = [column for column in (caption_column, label_column) if column is not None]
    columns = Columns(images, texts) if streaming else None
    asked = _Asked(*place, split, folder_flag, split_flag, columns)
    dataset, folder = _load_split(asked, cache_dir), None if streaming else asked.local
    for column, flag in images.items():
        check_image_column(dataset.features, column, flag)
    if caption_column is not None and caption_column not in dataset.features and folder:
        dataset = with_texts(dataset, image_column, caption_column)
    if caption_column is not None:
        check_caption_column(dataset.features, caption_column, folder)
    if label_column is not None:
        check_label_column(dataset.features, label_column, folder)
    dataset = _selected(dataset, images, caption_column, label_column, folder)
    return some_of(dataset, max_train_samples, seed, in_order=streaming)


def _check_most(samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise UsageError(f"--max_train_samples is {samples}; it must be at least 1.")


def some_of(rows: Dataset, most: int | None, seed: int, *, in_order: bool = False) -> Dataset:
    """At most so many of the rows, chosen by a shuffle with ``seed``; None keeps all."""
    if most is None:
        return rows
    if in_order:
        return rows.select(chosen_rows(len(rows), most, seed))
    return rows.shuffle(seed=seed).select(range(min(most, len(rows))))


def _selected(
    dataset: Dataset,
    images: Mapping[str, str],
    caption_column: str | None,
    label_column: str | None,
    folder: str | None,
) -> Dataset:
    """The columns of images, by the flags that name them, and of texts if any, in their forms."""
    texts = [column for column in (caption_column, label_column) if column is not None]
    dataset = dataset.select_columns(list(dict.fromkeys([*images, *texts])))
    for column, flag in images.items():
        dataset = _as_images(dataset, column, folder, flag)
    if label_column is not None and not isinstance(dataset.features[label_column], ClassLabel):
        dataset = _with_classes(dataset, label_column)
    return dataset


def _as_images(dataset: Dataset, column: str, folder: str | None, flag: str) -> Dataset:
    """With cells {"path", "bytes"}; paths are those of files here, or in the data set's folder."""
    if holds_paths(dataset.features[column]):
        cells = ((c or {}).get("path") if isinstance(c, dict) else c for c in dataset[column])
        paths = [_found(path, folder) for path in cells]
        if not any(path is not None and os.path.exists(path) for path in paths):
            places = "here" + (f" or in {folder!r}" if folder else "")
            raise UsageError(
                f"{flag} {column!r} holds texts, not images, nor a path of any file "
                f"{places}: {', '.join(map(repr, paths[:3]))}, ..."
            )
        with_both = dataset.add_column(f"{column} here", paths, feature=Value("string"))
        dataset = with_both.remove_columns(column).rename_column(f"{column} here", column)
    return dataset.cast_column(column, Image(decode=False))


def _found(path: str | None, folder: str | None) -> str | None:
    inside = None if path is None or folder is None else os.path.join(folder, path)
    return inside if inside is not None and os.path.exists(inside) else path


def _with_classes(dataset: Dataset, column: str) -> Dataset:
    """Words and numbers become classes, in sorted order; a missing one stays missing."""
    told = [class_value(value, column) for value in dataset[column]]
    values = sorted({value for value in told if value is not None})
    number: dict[Any, int] = {value: index for index, value in enumerate(values)}
    labels = [number.get(value) for value in told]
    bare = dataset.remove_columns(column)
    return bare.add_column(column, labels, feature=ClassLabel(names=list(map(str, values))))


class _Asked(NamedTuple):
    """What the command line names as data."""

    name: str | None
    config: str | None
    folder: str | None
    split: str | None
    flag: str  # of the folder
    split_flag: str
    streamed: Columns | None  # what is read of shards where they lie

    @property
    def told(self) -> str:
        """The flag that is given, with its value."""
        named = f"--dataset_name {self.name!r}", f"{self.flag} {self.folder!r}"
        return named[self.name is None]

    @property
    def local(self) -> str | None:
        """The folder that the data is in, None for another source."""
        path = self.folder if self.name is None else os.path.join(self.name, self.folder or "")
        return path if path is not None and os.path.isdir(path) else None


def _load_split(asked: _Asked, cache_dir: str | None) -> Dataset:
    remedy = "Check its name, content and the connection."
    if asked.name is None:
        remedy = "Check its metadata.jsonl or metadata.csv: one entry per image, all of one form."
        _check_folder(asked)
    if asked.streamed is not None:
        remedy = "Check the shards, and the connection if they are elsewhere."
    try:
        dataset = _load(asked, cache_dir)
    except UsageError:
        raise
    # A broken metadata file makes the readers raise nearly any type, IndexError included.
    except Exception as error:
        reason = describe(error).rstrip(".!")
        raise UsageError(f"{asked.told} cannot be loaded: {reason}. {remedy}") from error
    if len(dataset) == 0:
        raise UsageError(f"The data set {asked.name or asked.folder!r} has no samples.")
    return dataset


def _load(asked: _Asked, cache_dir: str | None) -> Dataset:
    name, local = asked.name, asked.local
    if asked.streamed is not None:
        return _load_shards(asked, asked.streamed, cache_dir)
    if name is None:
        return read_folder(
            Source(asked.flag, str(local), asked.split, None, asked.split_flag), cache_dir
        )
    if any(os.path.isfile(os.path.join(name, file)) for file in _SAVED):
        splits = _load_saved(name, asked.config, asked.folder)
    elif local and asked.config is None and is_image_folder(local):
        source = Source("--dataset_name", local, asked.split, "train", asked.split_flag)
        return read_folder(source, cache_dir)
    else:
        splits = load_dataset(name, asked.config, cache_dir=cache_dir, data_dir=asked.folder)
        splits = splits if isinstance(splits, DatasetDict) else DatasetDict()
        if local:
            warn_of_unread_files(name, asked.config, asked.folder, cache_dir)
    wanted = asked.split or "train"
    if wanted not in splits:
        raise UsageError(no_such_split("--dataset_name", name, wanted, splits, asked.split_flag))
    return splits[wanted]


def _load_shards(asked: _Asked, columns: Columns, cache_dir: str | None) -> Dataset:
    name, folder = asked.name, asked.folder
    place = (str(folder), None, None) if name is None else (name, asked.config, folder)
    rows = read_shards(
        *place, split=asked.split, columns=columns, cache_dir=cache_dir, split_flag=asked.split_flag
    )
    if asked.local is not None:
        warn_of_unread_files(*place, cache_dir)
    return rows


def _load_saved(name: str, config: str | None, folder: str | None) -> DatasetDict:
    if config is not None or folder is not None:
        raise ValueError(
            "it was written by save_to_disk, and has no configurations or folders to choose from: "
            "drop --dataset_config_name and --train_data_dir"
        )
    saved = load_from_disk(name)
    return DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved


def _check_folder(asked: _Asked) -> None:
    if asked.folder is None:
        raise UsageError("There is no training data: pass --dataset_name or --train_data_dir.")
    if asked.local is None:
        raise UsageError(f"{asked.told} is not a folder; check the path.")
