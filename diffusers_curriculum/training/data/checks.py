"""What is wrong with a sample, and how messages call it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusers_curriculum.models.image_files import remedy_of
from diffusers_curriculum.training.data.decoding import decode_image, refuse_bomb
from diffusers_curriculum.training.data.transforms import resized_size
from diffusers_curriculum.training.errors import UsageError


def sample_name(cell: dict[str, Any] | None, row: int) -> str:
    """Return how messages call a sample: its path (quoted, line breaks escaped) or its row."""
    path = (cell or {}).get("path")
    return repr(path) if path else f"row {row}"


def describe(error: Exception) -> str:
    """Return an exception as one line of text."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def decoded(cell: dict[str, Any], row: int, decode: Callable[..., Any]) -> Any:
    """Return what a cell decodes to; a UsageError names the sample, whatever ``decode`` raises, as
    its file may have changed since the check."""
    try:
        return decode(cell)
    except Exception as error:
        raise UsageError(f"{sample_name(cell, row)}: {describe(error)}") from error


def caption_fault(caption: Any) -> str | None:
    """Return what is wrong with a caption, None where it is a string or several strings."""
    if caption is None:
        return "the caption is missing"
    if isinstance(caption, str):
        return None
    if not isinstance(caption, Sequence | np.ndarray):
        return f"the caption {caption!r} is neither a string nor a list of strings"
    if len(caption) == 0:
        return "the list of captions is empty"
    wrong = next((c for c in caption if not isinstance(c, str)), "")
    return None if wrong == "" else f"the list of captions holds {wrong!r}, which is not a string"


def image_fault(cell: dict[str, Any], resolution: int, noted: list[str]) -> str | None:
    """Return why an image cannot be read and resized, None where it can; ``noted`` takes what is
    wrong beside its pixels."""
    path = cell.get("path")
    if cell.get("bytes") is None and path and os.path.exists(path) and not os.path.isfile(path):
        return "it is not a file"  # opening a pipe would wait for ever
    try:
        image = decode_image(cell, noted=noted)
        refuse_bomb(*resized_size(*image.size, resolution))
    # Decoders raise nearly every type on broken input; whichever it is, it is what we look for.
    except Exception as error:
        remedy = remedy_of(path or "")
        return describe(error) + (f" ({remedy})" if remedy else "")
    return None


def label_fault(label: Any) -> str | None:
    """Return what is wrong with a class, None where it is a number of a class."""
    missing = label is None or (isinstance(label, int) and label < 0)  # the Hub's word for none
    return "the class is missing" if missing else None
