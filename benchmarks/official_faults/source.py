"""The official script: which one it is, and a copy that runs beside any diffusers."""

from __future__ import annotations

import hashlib
import re
import subprocess
from importlib import metadata
from pathlib import Path

from benchmarks.official_faults.report import SCRIPT

# Commits by the hash of their script, for sources that are no git checkout.
KNOWN = {
    "4c5f10d3986bc41c96d595215600a98a8c7b24f384e7f276e57d5df9c7e62a8c": (
        "58eb52c0803ea9af3abec60841c2a093bdf1f951"
    )
}
PACKAGES = (
    "torch",
    "diffusers",
    "accelerate",
    "transformers",
    "datasets",
    "huggingface_hub",
    "torchvision",
    "tensorboard",
    "wandb",
)
CHECK = re.compile(r'^check_min_version\("(.+)"\)$', re.MULTILINE)


class SourceError(Exception):
    """There is no official script."""


def official(source: Path) -> str:
    """The text of the official script.

    Raises:
        SourceError: it is not there.
    """
    if not (source / SCRIPT).is_file():
        raise SourceError(f"there is no {SCRIPT} in {source}; name a checkout of diffusers")
    return (source / SCRIPT).read_text("utf-8")


def runnable(text: str) -> str:
    """The script without its demand for a diffusers that may not be released yet."""
    changed, number = CHECK.subn("", text)
    if number != 1:
        raise SourceError(f"the script asks {number} times for a version of diffusers, not once")
    return changed


def facts(source: Path) -> dict[str, object]:
    """Commit, hash and versions."""
    text = official(source)
    digest = hashlib.sha256(text.encode()).hexdigest()
    asked = CHECK.search(text)
    return {
        "diffusers_commit": _commit(source) or KNOWN.get(digest, "unknown"),
        "script_sha256": digest,
        "script_asks_for_diffusers": asked and asked[1],
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _commit(source: Path) -> str | None:
    """The commit that is checked out, None unless ``source`` is the top of a git checkout."""
    told = []
    for what in ("--show-toplevel", "HEAD"):
        command = ["git", "-C", str(source), "rev-parse", what]
        try:
            told.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return None
    return told[1].strip() if Path(told[0].strip()) == source.resolve() else None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "a stand-in" if package == "torchvision" else "not installed"
