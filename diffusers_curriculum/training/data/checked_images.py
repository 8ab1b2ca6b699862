"""Which images are known to decode, so that a second start does not decode them all again.

Only images found good are remembered: bad ones are few, and looking at them again costs nothing,
while a file that a busy disk or a wrong permission kept from being read gets its second chance.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, ImageFile

from diffusers_curriculum.models.image_files import codecs
from diffusers_curriculum.training.data.shards import file_of
from diffusers_curriculum.training.storage.files import write_atomically
from diffusers_curriculum.training.storage.fingerprints import hash_config

logger = logging.getLogger(__name__)

FORMAT = 1
CHECKER = 1  # raise it whenever an image that passed could now fail


@dataclass(frozen=True)
class CheckedImages:
    """Keys of images that passed the check described by `check`."""

    check: dict[str, Any]  # everything besides the image that its verdict depends on
    keys: frozenset[str] = frozenset()  # what `image_key` returned for each image


def described_check(resolution: int) -> dict[str, Any]:
    """Return what the verdict on an image depends on besides the image, as plain JSON data."""
    return {
        "format": FORMAT,
        "checker": CHECKER,
        "pillow": PIL.__version__,
        "codecs": codecs(),  # which come and go
        "resolution": resolution,
        "max_pixels": Image.MAX_IMAGE_PIXELS,
        "truncated": ImageFile.LOAD_TRUNCATED_IMAGES,
    }


def shared_file(cache_dir: str | None, source: str, resolution: int) -> Path:
    """Where all runs on a data set remember its good images: a folder, or a name on the Hub."""
    from datasets import config  # here, as it takes seconds

    place = os.path.realpath(source) if os.path.isdir(source) else source
    name = hash_config([place, described_check(resolution)])[:16]
    return Path(cache_dir or config.HF_DATASETS_CACHE, "checked_images", f"{name}.json")


def image_key(cell: dict[str, Any] | None) -> str | None:
    """Return a key that changes with the image: 32 hex digits, None where there is nothing to key.

    Embedded bytes are keyed by their content; a file by its path, size and times. The time of its
    last status change is among them, which no copying tool can set back.
    """
    content, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if content is not None:
        return hashlib.blake2b(content, digest_size=16, person=b"bytes").hexdigest()
    if not path:
        return None
    try:
        found = os.stat(file_of(path))
    except (OSError, ValueError):  # a missing file, or a name that no file can have
        return None
    text = f"{os.path.abspath(path)}\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return hashlib.blake2b(os.fsencode(text), digest_size=16, person=b"file").hexdigest()


def read_checked(path: Path, resolution: int) -> CheckedImages:
    """Return what an earlier check of the same kind left in a file; nothing if there is none, and
    with a warning if it is damaged or unreadable, which can only cost time."""
    check = described_check(resolution)
    try:
        content = json.loads(path.read_bytes())
        keys = content["good"] if content["check"] == check else []
        if not all(isinstance(key, str) for key in keys):
            raise TypeError("it holds something other than keys")
    except FileNotFoundError:
        keys = []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("Ignoring %s, all images are checked again: %r", path, error)
        keys = []
    return CheckedImages(check, frozenset(keys))


def write_checked(path: Path, known: CheckedImages, fresh: Iterable[str]) -> None:
    """Write the known keys and the fresh ones, whole or not at all; a failure is a warning."""
    content = {"check": known.check, "good": sorted(known.keys.union(fresh))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content))
    except OSError as error:
        logger.warning("The next start checks all images again: %s", error)
