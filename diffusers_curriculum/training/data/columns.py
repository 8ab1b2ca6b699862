"""Checks of the training data's columns: what they hold, and what a folder should have told."""

from __future__ import annotations

import logging
import os
import textwrap
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value

from diffusers_curriculum.models.image_files import METADATA_NAMES, list_folder, shown
from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

_CHUNK = 1000  # captions that are split into tokens at once
_LOOKED_AT = 50_000  # samples whose captions are, at most: some seconds
_TEXT = ("string", "large_string")
_METADATA_LIKE = (".jsonl", ".csv", ".parquet", ".json", ".txt", ".tsv")


def check_image_column(features: Features, column: str, flag: str = "--image_column") -> None:
    """Check that the column exists and holds images: decoded, as paths, bytes or both."""
    _check_there(features, flag, column)
    kind = features[column]
    if not (isinstance(kind, Image) or _holds_bytes(kind) or holds_paths(kind)):
        raise UsageError(
            f"{flag} {column!r} holds {features[column]}, not images. "
            f"Columns found: {_described(features)}."
        )


def holds_paths(kind: Any) -> bool:
    """Whether a column tells images by their paths alone."""
    kind = kind.get("path") if isinstance(kind, dict) and kind.keys() == {"path"} else kind
    return isinstance(kind, Value) and kind.dtype in _TEXT


def _holds_bytes(kind: Any) -> bool:
    if isinstance(kind, dict):
        kind = kind.get("bytes") if kind.keys() <= {"bytes", "path"} else None
    return isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")


def check_caption_column(
    features: Features, caption_column: str, folder: str | None = None
) -> None:
    """Check that the column exists and holds strings or lists of strings; for data of an image
    ``folder`` the message names the usual remedy."""
    hint = ""
    if folder and caption_column not in features:
        hint = _caption_hint(folder, caption_column)
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


def warn_of_long_captions(
    rows: Dataset, column: str, tokenizer: Any, limit: int | None = None
) -> None:
    """Log how many captions are cut, as they have more tokens than the text encoder is given:
    ``limit``, by default as many as the tokenizer makes. Of very many, some evenly apart are looked
    at."""
    apart = -(-len(rows) // _LOOKED_AT)
    captions = rows.select_columns([column])
    if apart > 1:
        captions = captions.select(range(0, len(rows), apart))
    taken = int(limit or tokenizer.model_max_length)
    most = taken - tokenizer.num_special_tokens_to_add()
    cut: list[tuple[int, int, str]] = []
    for first in range(0, len(captions), _CHUNK):
        cells = captions[first : first + _CHUNK][column]
        numbered = enumerate(cells, first)
        texts = ((n * apart, text) for n, cell in numbered for text in _phrasings(cell))
        # a token is one byte at least: short captions need not be split
        long = [(row, text) for row, text in texts if len(text.encode()) > most]
        ids = tokenizer([text for _, text in long], verbose=False).input_ids if long else []
        cut += [(row, len(n), t) for (row, t), n in zip(long, ids, strict=True) if len(n) > taken]
    if cut:
        row, tokens, text = max(cut, key=lambda entry: entry[1])
        logger.warning(
            "%d of %d samples%s have a caption of more than the %d tokens that the text encoder "
            "takes, and its end is cut off; the longest is that of row %d, with %d: %r",
            len({row for row, *_ in cut}),
            len(captions),
            f", of {len(rows)}," if apart > 1 else "",
            taken,
            row,
            tokens,
            textwrap.shorten(text, 200),
        )


def _phrasings(caption: Any) -> list[str]:
    return [caption] if isinstance(caption, str) else list(caption)


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
    others = list_folder(folder).others
    files = [path for path in others if path.lower().endswith(_METADATA_LIKE)]
    if any(os.path.basename(path) in METADATA_NAMES for path in files):
        return ""
    found = shown(folder, files)
    return (
        f"The image folder {folder!r} has no metadata.jsonl or metadata.csv: it is missing or its "
        f"name is misspelt (text files found: {found or 'none'}). Put one beside the images with "
        f'one entry per image, such as {{"file_name": "0001.png", "{column}": "a red bird"}}; '
        "or give all images one caption with --instance_prompt."
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
