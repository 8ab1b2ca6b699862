"""Checks of the training data's columns: what they hold, and what a folder should have told."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value

from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

_METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TEXT = ("string", "large_string")
_METADATA_LIKE = (".jsonl", ".csv", ".parquet", ".json", ".txt", ".tsv")


def check_image_column(features: Features, image_column: str) -> None:
    """Check that the column exists and holds images."""
    _check_there(features, "--image_column", image_column)
    if not isinstance(features[image_column], Image):
        raise UsageError(
            f"--image_column {image_column!r} holds {features[image_column]}, not images. "
            f"Columns found: {_described(features)}."
        )


def check_caption_column(
    features: Features, caption_column: str, folder: str | None = None
) -> None:
    """Check that the column exists and holds strings or lists of strings; for data of an image
    ``folder`` the message names the usual remedy."""
    hint = _caption_hint(folder, caption_column) if folder else ""
    _check_there(features, "--caption_column", caption_column, hint)
    if not _may_hold_text(features[caption_column]):
        raise UsageError(
            f"--caption_column {caption_column!r} holds {features[caption_column]}, neither "
            f"strings nor lists of strings. Columns found: {_described(features)}."
        )


def check_label_column(features: Features, label_column: str, folder: str | None = None) -> None:
    """Check that the column exists and holds classes: `ClassLabel`, numbers or words.

    Whether numbers are whole, :func:`class_value` tells: with some missing they are read as floats.
    """
    hint = (
        f"Put the images of {folder!r} into one folder per class (two or more, all equally deep), "
        "or name the class of each in a metadata.jsonl."
    )
    _check_there(features, "--label_column", label_column, hint if folder else "")
    kind = features[label_column]
    dtype = kind.dtype if isinstance(kind, Value) else ""
    named = dtype in _TEXT or dtype.startswith(("int", "uint", "float"))
    if not (named or isinstance(kind, ClassLabel)):
        raise UsageError(
            f"--label_column {label_column!r} holds {kind}, neither classes nor whole numbers nor "
            f"words. Columns found: {_described(features)}."
        )


def _check_there(features: Features, flag: str, column: str, hint: str = "") -> None:
    if column not in features:
        raise UsageError(
            f"{flag} {column!r} is not a column of the data set. Columns found: "
            f"{', '.join(features)}. {hint or f'Pass {flag} with one of these.'}"
        )


def _described(features: Features) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in features.items())


def _may_hold_text(kind: Any) -> bool:
    if isinstance(kind, List | LargeList):
        kind = kind.feature
    # "null" is a column of missing values only: the check of the rows names them.
    return isinstance(kind, Value) and kind.dtype in (*_TEXT, "null")


def _caption_hint(folder: str, column: str) -> str:
    """Return the remedy for an image folder without captions, naming the look-alikes it holds."""
    root = Path(folder)
    files = [p for p in root.rglob("*") if p.suffix.lower() in _METADATA_LIKE]
    if any(p.name in _METADATA_NAMES for p in files):
        return ""
    found = ", ".join(sorted(repr(str(p.relative_to(root))) for p in files)[:5])
    return (
        f"The image folder {folder!r} has no metadata.jsonl or metadata.csv: it is missing or its "
        f"name is misspelt (text files found: {found or 'none'}). Put one beside the images with "
        f'one entry per image, such as {{"file_name": "0001.png", "{column}": "a red bird"}}.'
    )


def class_value(value: Any, column: str) -> int | str | None:
    """Return what a cell of numbers or words says about the class; None where it is missing, and
    a UsageError for a number with a fraction."""
    if value is None or isinstance(value, str):
        return value
    if value != value or value < 0:  # NaN, or the Hub's word for none
        return None
    if value != int(value):
        raise UsageError(
            f"--label_column {column!r} holds {value}: classes are whole numbers or words."
        )
    return int(value)


def warn_of_unlisted_images(dataset: Dataset, folder: str, image_suffixes: Sequence[str]) -> None:
    """Log a warning where a folder holds more image files than its metadata names, as `datasets`
    leaves those out without a word."""
    suffixes = set(image_suffixes)
    present = sum(p.suffix.lower() in suffixes and p.is_file() for p in Path(folder).rglob("*"))
    if present > len(dataset):
        logger.warning(
            "%d of the %d image files in %r have no entry in its metadata and are left out.",
            present - len(dataset),
            present,
            folder,
        )
