"""What was encoded once and is on disk, how it is opened and checked: the files of a cache beside
``manifest.json``, and ``verified.json``, which tells what they were like when their digests were
last compared."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_curriculum.training.errors import CheckpointError, UsageError
from diffusers_curriculum.training.storage.files import write_atomically
from diffusers_curriculum.training.storage.fingerprints import flattened, hash_config
from diffusers_curriculum.training.storage.manifest import MANIFEST, find_faults, read_manifest

logger = logging.getLogger(__name__)

_VERIFIED = "verified.json"


class Kind(NamedTuple):
    """What a cache is of.

    Attributes:
        fact: the name of its fingerprint in the manifest.
        title: in messages.
    """

    fact: str
    title: str


LATENTS, CAPTIONS = Kind("latents", "latent cache"), Kind("captions", "text cache")


def sealed(given: Mapping[str, Any], own: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The fingerprint of a cache: all that its files depend on but the versions of libraries, with
    a digest over it.

    Args:
        given: what it is made with and from, as plain JSON data.
        own: what the cache itself adds to that.

    Raises:
        UsageError: ``given`` names what the cache itself adds, or is no JSON data.
    """
    taken = sorted(given.keys() & {*own, "sha256"})
    if taken:
        raise UsageError(f"The fingerprint of a {kind.title} must not have its own {taken}.")
    try:
        whole = json.loads(json.dumps({**given, **own}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"The fingerprint {dict(given)!r} is no JSON data: {error}.") from error
    return {**whole, "sha256": hash_config(whole)}


def is_there(folder: Path, kind: Kind, fingerprint: Mapping[str, Any], hashes: bool = True) -> bool:
    """Whether a folder holds the cache of a fingerprint; where it holds nothing there is none yet.

    Args:
        hashes: compare the files' SHA-256, unless they are as they were when it was last compared;
            otherwise only their sizes.

    Raises:
        UsageError: it was made from something else, is damaged, or is no such cache.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} exists and is no {kind.title}: give another folder.")
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        raise UsageError(f"{folder / MANIFEST} is damaged: delete {folder}.") from None
    if kind.fact not in manifest["facts"]:
        what = next((k.title for k in (LATENTS, CAPTIONS) if k.fact in manifest["facts"]), None)
        what = what or "checkpoint"
        raise UsageError(f"{folder} is a {what} and no {kind.title}: give another folder.")
    _refuse_other(folder, kind, manifest["facts"][kind.fact], fingerprint)
    files = manifest["files"]
    known = not hashes or _were_verified(folder, files)
    faults = _wrong_sizes(folder, files) if known else find_faults(folder, manifest)
    if faults:
        raise UsageError(
            f"The {kind.title} {folder} is damaged: {'; '.join(faults)}. Delete it, and it is made "
            "again."
        )
    if not known:
        remember_verified(folder, files)
    return True


def remember_verified(folder: Path, files: Iterable[str]) -> None:
    """Note that the files are what the manifest says, so that the next start need not read them.

    A folder that cannot be written to is read at each start.
    """
    try:
        write_atomically(folder / _VERIFIED, json.dumps(_stamps(folder, files)))
    except OSError as error:
        logger.warning("The next start reads all of %s again: %s", folder, error)


def _were_verified(folder: Path, files: Iterable[str]) -> bool:
    try:
        return json.loads((folder / _VERIFIED).read_bytes()) == _stamps(folder, files)
    except (OSError, ValueError, RecursionError):
        return False


def _stamps(folder: Path, files: Iterable[str]) -> dict[str, list[int]]:
    """Size of each file, and when its content and its state last changed; the latter time is one
    that no copying sets back."""
    stats = {name: os.stat(folder / name) for name in files}
    return {name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats.items()}


def _refuse_other(
    folder: Path, kind: Kind, saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    old, new = ({k: v for n in part for k, v in flattened(part[n], n)} for part in (saved, wanted))
    names = sorted(name for name in old | new if old.get(name) != new.get(name))
    if names:
        told = "; ".join(f"{name}: {old.get(name)!r}, now {new.get(name)!r}" for name in names)
        raise UsageError(
            f"The {kind.title} {folder} was made from something else ({told}). Give another "
            "folder, or delete it."
        )


def _wrong_sizes(folder: Path, files: Mapping[str, Any]) -> list[str]:
    sizes = {name: size_of(folder / name) for name in files}
    return [
        f"{name} has {sizes[name]} bytes instead of {entry['size']}"
        for name, entry in files.items()
        if sizes[name] != entry["size"]
    ]


def size_of(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1
