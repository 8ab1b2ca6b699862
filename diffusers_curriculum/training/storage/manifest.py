"""The manifest that makes a checkpoint verifiable: size and sha256 of every file, and of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers_curriculum.catalogue import GROUPS
from diffusers_curriculum.training.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "diffusers-curriculum")


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, and return the manifest.

    Files that the manifest does not list are ignored, here and by everything that loads.

    Raises:
        CheckpointError: the manifest or a file that it lists is missing or differs; the message
            names each of them.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    faults = find_faults(folder, manifest)
    if faults:
        raise CheckpointError(
            f"The checkpoint {folder} is damaged: {'; '.join(faults)}. Resume from another one."
        )
    return manifest


def find_faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with each damaged or missing file of a checkpoint, by the file's name."""
    found = (_fault(folder, name, entry) for name, entry in manifest["files"].items())
    return [fault for fault in found if fault]


def versions() -> dict[str, str | None]:
    """The installed versions of the libraries that results depend on, and of those that register
    laws of their own; None if not installed."""
    found = metadata.entry_points()  # once, as it opens a file of every installed package
    points = (point for group in GROUPS for point in found.select(group=group))
    own = {point.dist.name for point in points if point.dist}
    return {name: _version(name) for name in (*PACKAGES, *sorted(own))}


def _fault(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with one listed file, or None."""
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
        if file_sha256(path) != entry["sha256"]:
            return f"{name} has another sha256 than when it was written"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return None


def write_manifest(folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` for all files now in ``folder``.

    Raises:
        CheckpointError: ``facts`` holds something that strict JSON cannot.
    """
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in sorted(names)
        if name != MANIFEST
    }
    told = {"step": step, "versions": versions(), "facts": dict(facts), "files": files}
    try:
        text = _with_digest({"format": FORMAT, **told})
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"facts={dict(facts)!r} do not fit into a manifest ({error}): give strings, finite "
            "numbers, lists and dicts with string keys."
        ) from error
    with open(folder / MANIFEST, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after a check of its own digest; no other file is read.

    Raises:
        CheckpointError: it is missing, unreadable, altered, or of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was not written by this project, or not finished. "
            "Training cannot go on from it. Only weights can be taken from a checkpoint of "
            "another script: load them as the pretrained model."
        )
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        body = {key: value for key, value in manifest.items() if key != "digest"}
        # The text is compared, not only the digest: some flipped bits (the e of 1e-5, say) leave
        # the parsed content as it was.
        whole = _with_digest(body) == text and _is_well_formed(manifest)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Resume from another one.") from error
    if not whole:
        raise CheckpointError(f"{path} is damaged (its digest differs). Resume from another one.")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this version reads {FORMAT}: update "
            "diffusers-curriculum."
        )
    return manifest


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_digest(body: Mapping[str, Any]) -> str:
    """The one text of a manifest: canonical JSON that carries the sha256 of the rest of it."""
    digest = hashlib.sha256(_canonical(body).encode()).hexdigest()
    return _canonical({**body, "digest": digest})


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _is_well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether the parts that this module relies on are there, and no path leaves the folder."""
    files, step = manifest.get("files"), manifest.get("step")
    if not (isinstance(files, dict) and isinstance(step, int) and "format" in manifest):
        return False
    return all(
        _stays_inside(name) and isinstance(entry, dict) and {"size", "sha256"} <= entry.keys()
        for name, entry in files.items()
    )


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
