"""Where training images come from: the Hub, a local data set, or a folder of images."""

from __future__ import annotations

import glob
import os
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from diffusers_curriculum.training.data.checks import describe
from diffusers_curriculum.training.data.columns import (
    check_caption_column,
    check_image_column,
    check_label_column,
    class_value,
    warn_of_unlisted_images,
)
from diffusers_curriculum.training.errors import UsageError

_SAVED = ("state.json", "dataset_dict.json")  # of save_to_disk: a data set, or several splits


def load_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    *,
    cache_dir: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str | None = None,
    max_train_samples: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load the training split from the Hub, a local path or an image folder, images undecoded.

    Args:
        dataset_name: as `datasets.load_dataset` takes it, or a folder of `save_to_disk`; None reads
            `train_data_dir` as an image folder with a metadata.jsonl or metadata.csv, or one whose
            sub-folders are the classes.
        caption_column: column of captions; None leaves them out.
        label_column: column of classes, of numbers or words; None leaves classes out.
        max_train_samples: keep this many samples, chosen by a shuffle with `seed`.

    Returns:
        The columns asked for, that of classes with its `ClassLabel` names; an image cell is
        {"path", "bytes"}.

    Raises:
        UsageError: nothing to load, not loadable, empty, or without these columns.
    """
    if max_train_samples is not None and max_train_samples < 1:
        raise UsageError(f"--max_train_samples is {max_train_samples}; it must be at least 1.")
    dataset = _load_training_split(dataset_name, dataset_config_name, train_data_dir, cache_dir)
    folder = _local_folder(dataset_name, train_data_dir)
    check_image_column(dataset.features, image_column)
    columns = [image_column]
    if caption_column is not None:
        check_caption_column(dataset.features, caption_column, folder)
        columns.append(caption_column)
    if label_column is not None:
        check_label_column(dataset.features, label_column, folder)
        columns.append(label_column)
    dataset = dataset.select_columns(columns)
    if label_column is not None and not isinstance(dataset.features[label_column], ClassLabel):
        dataset = _with_classes(dataset, label_column)
    if max_train_samples is not None:
        kept = range(min(max_train_samples, len(dataset)))
        dataset = dataset.shuffle(seed=seed).select(kept)
    return dataset.cast_column(image_column, Image(decode=False))


def _with_classes(dataset: Dataset, column: str) -> Dataset:
    """Words and numbers become classes, in sorted order; a missing one stays missing."""
    told = [class_value(value, column) for value in dataset[column]]
    values = sorted({value for value in told if value is not None})
    number: dict[Any, int] = {value: index for index, value in enumerate(values)}
    labels = [number.get(value) for value in told]
    bare = dataset.remove_columns(column)
    return bare.add_column(column, labels, feature=ClassLabel(names=list(map(str, values))))


def _load_training_split(
    name: str | None, config: str | None, folder: str | None, cache_dir: str | None
) -> Dataset:
    splits = _load_splits(name, config, folder, cache_dir)
    if "train" not in splits:
        found = ", ".join(map(str, splits))
        raise UsageError(f"--dataset_name {name!r} has no split 'train'; it has: {found}.")
    dataset = splits["train"]
    if len(dataset) == 0:
        raise UsageError(f"The data set {name or folder!r} has no samples.")
    local = _local_folder(name, folder)
    if local is not None and name is None:
        warn_of_unlisted_images(dataset, local, ImageFolder.EXTENSIONS)
    return dataset


def _local_folder(dataset_name: str | None, train_data_dir: str | None) -> str | None:
    name = train_data_dir if dataset_name is None else dataset_name
    return name if name is not None and os.path.isdir(name) else None


def _load_splits(
    name: str | None, config: str | None, folder: str | None, cache_dir: str | None
) -> DatasetDict:
    flag, value, remedy = "--dataset_name", name, "Check its name, content and the connection."
    files: dict[str, str] = {}
    if name is None:
        files["train"] = os.path.join(_checked_folder(folder), "**")
        flag, value = "--train_data_dir", folder
        remedy = "Check its metadata.jsonl or metadata.csv: one entry per image, all of one form."
    try:
        if name is None:
            loaded = load_dataset("imagefolder", data_files=files, cache_dir=cache_dir)
        elif any(os.path.isfile(os.path.join(name, file)) for file in _SAVED):
            loaded = _load_saved(name, config, folder)
        else:
            loaded = load_dataset(name, config, cache_dir=cache_dir, data_dir=folder)
    # A broken metadata file makes the readers raise nearly any type, IndexError included.
    except Exception as error:
        reason = describe(error).rstrip(".!")
        raise UsageError(f"{flag} {value!r} cannot be loaded: {reason}. {remedy}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict()


def _load_saved(name: str, config: str | None, folder: str | None) -> DatasetDict:
    if config is not None or folder is not None:
        raise ValueError(
            "it was written by save_to_disk, and has no configurations or folders to choose from: "
            "drop --dataset_config_name and --train_data_dir"
        )
    saved = load_from_disk(name)
    return DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved


def _checked_folder(folder: str | None) -> str:
    if folder is None:
        raise UsageError("There is no training data: pass --dataset_name or --train_data_dir.")
    if "://" in folder or (glob.has_magic(folder) and not os.path.exists(folder)):
        return folder  # a remote address or a pattern: for datasets to resolve
    if not os.path.isdir(folder):
        raise UsageError(f"--train_data_dir {folder!r} is not a folder; check the path.")
    names = (name for _, _, names in os.walk(folder) for name in names)
    if not any(os.path.splitext(name)[1].lower() in ImageFolder.EXTENSIONS for name in names):
        raise UsageError(f"--train_data_dir {folder!r} has no images in it or in its subfolders.")
    return glob.escape(folder)  # a folder may be called "cats [final]"
