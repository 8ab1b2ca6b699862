"""The samples of a run: those that are trained on, and those that are kept apart."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset

from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.validation import held_out_share
from diffusers_curriculum.training.data.joined import each_source, joined_rows
from diffusers_curriculum.training.data.sources import load_images, some_of
from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """Samples, images undecoded.

    Attributes:
        training: what is trained on; no image file of it is held out, too.
        held_out: what is kept apart; None for nothing.
    """

    training: Dataset
    held_out: Dataset | None = None

    def each(self, change: Callable[[Dataset], Dataset]) -> Rows:
        """Both, changed alike."""
        return Rows(change(self.training), None if self.held_out is None else change(self.held_out))


def read_rows(args: Arguments, seed: int, **columns: Any) -> Rows:
    """The samples that the flags ask for.

    Those of several sources have captions in the column that ``args`` name.

    Args:
        seed: chooses --max_train_samples; what is held out does not depend on it.
        columns: as ``caption_column``, ``label_column`` or ``mask_column``, the last of training
            samples alone.

    Raises:
        UsageError: nothing to load, not loadable, empty, or without these columns; a share that is
            no sample, or leaves none to train on.
    """
    load = partial(load_images, cache_dir=args.cache_dir, **columns)
    named = args.dataset_name, args.dataset_config_name, args.train_data_dir
    data = partial(load, *named, image_column=args.image_column, streaming=args.streaming)
    some = partial(some_of, most=args.max_train_samples, seed=seed, in_order=args.streaming)
    share = held_out_share(args.validation_split)
    if args.sources:
        rows = joined_rows(args, seed, columns.get("mask_column"))
    else:
        rows = data(split=args.train_split)
    if share is not None:
        rows, held_out = _parted(rows, share)
    elif args.validation_split is not None:
        name = args.validation_split
        held_out = data(split=name, split_flag="--validation_split", mask_column=None)
    elif args.validation_data_dir is not None:
        column = args.image_column if args.dataset_name is None else "image"
        folder = {
            "train_data_dir": args.validation_data_dir,
            "folder_flag": "--validation_data_dir",
        }
        held_out = load(**folder, image_column=column, mask_column=None)
        held_out = held_out.rename_columns({column: args.image_column})
    else:
        return Rows(some(rows))
    rows = _without_files_of(held_out, rows, args.image_column)
    if "label_column" in columns:
        held_out = _with_classes_of(rows, held_out, columns["label_column"])
    return Rows(some(rows), held_out)


def _parted(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """The rest, and a share that is the same for every seed; each in order."""
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise UsageError(
            f"--validation_split is {share:g}, which is {count} of {len(rows)} samples: give a "
            "share that keeps some of them apart and leaves others to train on."
        )
    order = host_generator(0, purpose="validation_split").permutation(len(rows))
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))


def _without_files_of(held_out: Dataset, rows: Dataset, column: str) -> Dataset:
    """The rows whose images are not held out, too: a file may stand in several, or in both folders.
    What is embedded in a table has no file that tells."""
    files = {file for file in _files(held_out, column) if file is not None}
    kept = [row for row, file in enumerate(_files(rows, column)) if file not in files]
    if len(kept) == len(rows):
        return rows
    if not kept:
        raise UsageError(
            f"nothing is left to train on: all images of the {len(rows)} training samples are kept "
            "apart; give other ones as --validation_split or --validation_data_dir."
        )
    left_out = len(rows) - len(kept)
    logger.warning("%d samples are not trained on, as their images are kept apart.", left_out)
    return rows.select(kept)


def _files(rows: Dataset, column: str) -> list[str | None]:
    """The file of each image, links followed; None where there is none."""
    return [file for part in each_source(rows) for file in _files_of_one(part, column)]


def _files_of_one(rows: Dataset, column: str) -> list[str | None]:
    cells = rows.select_columns([column])
    if (cells[0][column] or {}).get("bytes") is not None:  # which need not be read for that
        return [None] * len(cells)
    paths = ((cell or {}).get("path") for cell in cells[column])
    return [path and os.path.realpath(path) for path in paths]


def _with_classes_of(rows: Dataset, held_out: Dataset, column: str) -> Dataset:
    """The held-out samples with the numbers that classes of these names have in training."""
    names, own = rows.features[column].names, held_out.features[column].names
    if names == own:
        return held_out
    unknown = [name for name in own if name not in names]
    if unknown:
        raise UsageError(
            f"--label_column {column!r}: {unknown[0]!r} is a class of the samples that are kept "
            f"apart, and not of those to train on, which are {', '.join(names[:10])}."
        )
    numbers = [names.index(name) for name in own]
    labels = [None if label is None else numbers[label] for label in held_out[column]]
    bare = held_out.remove_columns(column)
    return bare.add_column(column, labels, feature=rows.features[column])
