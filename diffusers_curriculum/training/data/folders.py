"""A folder of images on this machine, read by `datasets` from this project's own listing."""

from __future__ import annotations

import logging
import os
import re
from typing import Any, NamedTuple

import datasets
from datasets import Dataset
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from diffusers_curriculum.models.image_files import (
    METADATA_NAMES,
    ImageSuffixes,
    Listing,
    list_folder,
    shown,
    warn_of_left_out,
)
from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_TABLES = (".arrow", ".parquet", ".tar")  # of other data sets, whatever pictures are beside them
_TEXTS = (".csv", ".json", ".jsonl", ".tsv")  # of other data sets, where they are more than images


class Source(NamedTuple):
    """A folder of images, and how the command line calls it.

    Attributes:
        split: asked for; None for the flag's default.
        default: the split where none is asked for; None for all.
        split_flag: the flag that asks for one.
    """

    flag: str
    folder: str
    split: str | None
    default: str | None
    split_flag: str


class _Images(ImageFolder):
    """As `datasets` has it, with every suffix that Pillow opens here."""

    EXTENSIONS: Any = ImageSuffixes()


def is_image_folder(folder: str) -> bool:
    """Whether a local data set is one of images, and says nothing of its configurations itself."""
    from huggingface_hub import DatasetCard

    card = os.path.join(folder, "README.md")
    if os.path.isfile(card) and "configs" in DatasetCard.load(card).data.to_dict():
        return False
    found = list_folder(folder)
    others = [path for path in found.others if os.path.basename(path) not in METADATA_NAMES]
    if any(path.lower().endswith(_TABLES) for path in others):
        return False
    texts = sum(path.lower().endswith(_TEXTS) for path in others)
    return bool(found.images) and len(found.images) >= texts


def read_folder(source: Source, cache_dir: str | None) -> Dataset:
    """The images of a folder with their metadata or classes; what is left out is logged.

    Raises:
        UsageError: no images, or no such split.
    """
    flag, folder, found = source.flag, source.folder, list_folder(source.folder)
    if not (found.images or any(path.endswith(".zip") for path in found.others)):
        warn_of_left_out(folder, found, ())
        raise UsageError(f"{flag} {folder!r} has no images in it or in its subfolders.")
    away = _other_splits(source, found)
    rows = _built(_without(found, away), cache_dir)
    columns = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    paths = _paths(rows, columns[0]) if columns else []
    if away and columns:  # metadata above the folders of the splits may name images of all of them
        kept = [row for row, path in enumerate(paths) if not _inside(path, away)]
        rows = rows if len(kept) == len(rows) else rows.select(kept)
        paths = [paths[row] for row in kept]
        why = f"they are in folders of other splits than {source.split or source.default!r}"
        found.left_out[why] = [path for path in found.images if _inside(path, away)]
        found = found._replace(images=_without(found, away).images)
    others = (path for column in columns[1:] for path in _paths(rows, column))
    warn_of_left_out(folder, found, {*paths, *others})
    return rows


def warn_of_unread_files(
    name: str, config: str | None, folder: str | None, cache_dir: str | None
) -> None:
    """Log which data files of a local data set belong to none of its splits, as `datasets` leaves
    those out without a word that lack the words for splits which others have in their names."""
    options: dict[str, Any] = {"cache_dir": cache_dir, "data_dir": folder}
    files = datasets.load_dataset_builder(name, config, **options).config.data_files or {}
    read = {os.path.realpath(path) for paths in files.values() for path in paths}
    suffixes = {os.path.splitext(path)[1] for path in read}
    found = list_folder(os.path.join(name, folder or ""))
    everything = (*found.images, *found.others)
    data = [path for path in everything if os.path.splitext(path)[1] in suffixes]
    unread = [path for path in data if os.path.realpath(path) not in read]
    if unread:
        logger.warning(
            "%d of the %d data files in %r belong to none of its splits (%s) and are left out: %s",
            len(unread),
            len(data),
            name,
            ", ".join(map(str, files)),
            shown(name, unread),
        )


def _built(found: Listing, cache_dir: str | None) -> Dataset:
    metadata = [path for path in found.others if os.path.basename(path) in METADATA_NAMES]
    archives = [path for path in found.others if path.lower().endswith(".zip")]
    paths = sorted([*found.images, *metadata, *archives])
    stamps: list[Any] = [(f"{s.st_mtime_ns} {s.st_size}",) for s in map(os.stat, paths)]
    builder: Any = _Images(
        cache_dir=cache_dir,
        dataset_name="imagefolder",
        hash=datasets.__version__,
        data_files=DataFilesDict(train=DataFilesList(paths, stamps)),
    )
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def _paths(rows: Dataset, column: str) -> list[str]:
    """Of a column's images; "" where there is none."""
    alone = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return [(cell or {}).get("path") or "" for cell in alone[column]]


def with_texts(rows: Dataset, image_column: str, caption_column: str) -> Dataset:
    """With captions from text files of the images' names, if there are any; None where one is
    missing. A UsageError names a file that is no text."""
    if not isinstance(rows.features[image_column], datasets.Image):
        return rows
    texts = [_text_beside(path) for path in _paths(rows, image_column)]
    if all(text is None for text in texts):
        return rows
    return rows.add_column(caption_column, texts, feature=datasets.Value("string"))


def _text_beside(image: str) -> str | None:
    path = os.path.splitext(image)[0] + ".txt"
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return " ".join(file.read().split())
    except (OSError, ValueError) as error:
        raise UsageError(f"the caption {path!r} cannot be read as UTF-8: {error}.") from error


# -- splits ----------------------------------------------------------------------------------------


def _other_splits(source: Source, found: Listing) -> list[str]:
    """The folders of the splits that are not trained on."""
    splits = split_folders(source.folder, found.images)
    if source.split is None and source.default is None:
        if len(splits) > 1:
            _tell_that_all_are_taken(source, splits, found)
        return []
    wanted = source.split or source.default or ""
    if not splits and wanted == "train":
        return []
    wanted = _SPLIT_OF.get(wanted.lower(), wanted)
    if wanted not in splits:
        known, where = splits or ["train"], (source.flag, source.folder)
        raise UsageError(no_such_split(*where, wanted, known, source.split_flag))
    return [folder for split in splits if split != wanted for folder in splits[split]]


def no_such_split(flag: str, name: str, split: str, known: Any, split_flag: str) -> str:
    """What is said of a split that a data set does not have."""
    return (
        f"{flag} {name!r} has no split {split!r}; it has: {', '.join(map(str, known))}. "
        f"Choose one with {split_flag}."
    )


def _tell_that_all_are_taken(source: Source, splits: dict[str, list[str]], found: Listing) -> None:
    counts = {s: sum(_inside(path, splits[s]) for path in found.images) for s in splits}
    logger.warning(
        "%s %r holds folders of several splits (%s): all of their images are used%s.",
        source.flag,
        source.folder,
        ", ".join(f"{split}: {count}" for split, count in counts.items()),
        "; choose one with --train_split" if source.flag == "--train_data_dir" else "",
    )


def split_folders(root: str, images: list[str]) -> dict[str, list[str]]:
    """The folders of each split, where all folders of a level are called after splits: names with
    words such as "train", "val" or "test". Words in the names of files mean nothing."""
    top, parts = os.path.abspath(root), [os.path.dirname(path) for path in images]
    while True:
        names = {part[len(top) :].lstrip(os.sep).partition(os.sep)[0] for part in parts}
        splits = {name: _split_of(name) for name in sorted(names)}
        if names and all(splits.values()):
            named = {split: [] for split in _SPLITS if split in splits.values()}
            for name, split in splits.items():
                named[str(split)].append(os.path.join(top, name))
            return named
        if len(names) != 1 or "" in names:
            return {}
        top = os.path.join(top, names.pop())


def _split_of(name: str) -> str | None:
    found = (_SPLIT_OF.get(word) for word in re.split(r"[-._ 0-9]+", name.lower()))
    return next((split for split in found if split), None)


def _inside(path: str, folders: list[str]) -> bool:
    return path.startswith(tuple(folder + os.sep for folder in folders))


def _without(found: Listing, folders: list[str]) -> Listing:
    images, others = (
        [path for path in paths if not _inside(path, folders)]
        for paths in (found.images, found.others)
    )
    return found._replace(images=images, others=others)
