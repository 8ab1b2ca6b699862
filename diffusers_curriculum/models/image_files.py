"""The one listing of an image folder: which of its files are images, and why others are not."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Container, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
HIDDEN = "they are hidden (a dot begins their name, or a dot or two underscores that of a folder)"
BROKEN = "they are links to nothing, or no plain files"
UNLISTED = "they have no entry in its metadata"
_SHOWN = 5  # names in a message
_BESIDE = {".csv", ".json", ".jsonl", ".parquet", ".txt"}  # what often lies beside images
_SEVERAL = {".h5", ".hdf"}  # files of any number of images
# Pictures that Pillow cannot read, and what makes it, if anything.
_UNREADABLE = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pip install 'pillow>=11.3'"),
    ".jxl": "pip install pillow-jxl-plugin",
    **dict.fromkeys((".svg", ".exr", ".hdr"), "save them as PNG"),
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf"), "save them as PNG"),
}


class Listing(NamedTuple):
    """The files of a folder, sorted by their absolute paths.

    Attributes:
        images: what Pillow can open, by the names.
        others: neither images nor left out, such as metadata and captions.
        left_out: pictures, by the reason for which they are no training images.
        repeated: folders that links lead to and that are read already, or hold this one.
    """

    images: list[str]
    others: list[str]
    left_out: dict[str, list[str]]
    repeated: list[str]


def codecs() -> list[str]:
    """The packages for HEIC and JPEG XL that are installed."""
    return [name for name in ("pillow_heif", "pillow_jxl") if find_spec(name)]


@cache
def register_codecs() -> None:
    """Let Pillow read HEIC and JPEG XL in this process, where their packages are installed."""
    for module in map(import_module, codecs()):
        if module.__name__ == "pillow_heif":
            module.register_heif_opener()  # the other one registers itself


@cache
def is_image_suffix(suffix: str) -> bool:
    """Whether Pillow opens files of a suffix, in lower case. Those for rarer formats are some sixty
    modules, which are loaded when such a suffix is met."""
    from PIL import Image  # here, as a command line is checked without it

    Image.preinit()
    if suffix not in Image.EXTENSION and suffix not in _BESIDE:
        register_codecs()
        Image.init()
    return Image.EXTENSION.get(suffix) in Image.OPEN and suffix not in _SEVERAL


class ImageSuffixes(Container[str]):
    """All suffixes of which :func:`is_image_suffix` holds."""

    def __contains__(self, suffix: Any) -> bool:
        return is_image_suffix(suffix)


def remedy_of(path: str) -> str | None:
    """What makes a picture of this name readable that Pillow cannot read; None for any other."""
    suffix = _suffix(path)
    return None if is_image_suffix(suffix) else _UNREADABLE.get(suffix)


def list_folder(folder: str | os.PathLike[str]) -> Listing:
    """List all files below a folder; links are followed, to each folder once."""
    root = os.path.abspath(folder)
    found = Listing([], [], {}, [])
    for path in _walk(root, found.repeated):
        reason, suffix = _reason(path, root), _suffix(path)
        picture = is_image_suffix(suffix) or suffix in _UNREADABLE
        if reason is None:
            (found.images if picture else found.others).append(path)
        elif picture:
            found.left_out.setdefault(reason, []).append(path)
    for paths in (found.images, found.others, *found.left_out.values()):
        paths.sort()
    return found


def has_files(folder: str | os.PathLike[str]) -> bool:
    """Whether there is any file below a folder."""
    return any(True for _ in _walk(os.path.abspath(folder), []))


def warn_of_left_out(folder: str, found: Listing, read: Collection[str]) -> None:
    """Log which pictures of a folder are not among those that are ``read``, and why."""
    known = set(read)
    reasons = found.left_out | {UNLISTED: found.images}
    missing = {why: [path for path in reasons[why] if path not in known] for why in reasons}
    total = len(found.images) + sum(map(len, found.left_out.values()))
    for why, paths in missing.items():
        if paths:
            count, names = len(paths), shown(folder, paths)
            text = "%d of the %d image files in %r are left out, as %s: %s"
            logger.warning(text, count, total, folder, why, names)
    if found.repeated:
        names = shown(folder, found.repeated)
        text = "Links in %r lead to folders that are read already, or hold this one: %s"
        logger.warning(text, folder, names)


def shown(folder: str, paths: Collection[str]) -> str:
    """The first few paths of a folder, for a message."""
    names = [repr(os.path.relpath(path, folder)) for path in sorted(paths)[:_SHOWN]]
    return ", ".join([*names, *(["..."] if len(paths) > _SHOWN else [])])


def _reason(path: str, root: str) -> str | None:
    """Why a file is left out that may be a picture."""
    *folders, name = path[len(root) :].lstrip(os.sep).split(os.sep)
    if name.startswith(".") or any(part.startswith((".", "__")) for part in folders):
        return HIDDEN
    if not os.path.isfile(path):
        return BROKEN
    remedy = remedy_of(path)
    return f"Pillow cannot read {_suffix(path)} files here ({remedy})" if remedy else None


def _walk(root: str, repeated: list[str]) -> Iterator[str]:
    """All files; a folder's own subfolders come before those that links lead to."""
    seen, tops = set[str](), [root]
    for top in tops:  # it grows meanwhile
        for parent, folders, files in os.walk(top):
            real = os.path.realpath(parent)
            if real in seen or (parent != root and _holds(real, root)):
                repeated.append(parent)
                folders.clear()
                continue
            seen.add(real)
            yield from (os.path.join(parent, name) for name in files)
            paths = (os.path.join(parent, name) for name in sorted(folders))
            tops += [path for path in paths if os.path.islink(path)]


def _holds(folder: str, inner: str) -> bool:
    return os.path.commonpath([folder, os.path.realpath(inner)]) == folder


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
