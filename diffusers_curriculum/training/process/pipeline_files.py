"""What a saved pipeline says of itself in its small files; no weight is read, no code is run."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.storage.components import variant_of

INDEX = "model_index.json"
_UNANSWERED = (OSError, ValueError, EntryNotFoundError, HfHubHTTPError, HFValidationError)
_FORMER = {"Transformer2DModel": "DiTTransformer2DModel"}  # names of one class


def read_json_file(path: str, revision: str | None, name: str) -> dict[str, Any]:
    """A JSON file of the pipeline at ``path``, its folder or its name on the Hub; empty where there
    is none, which the loader judges better."""
    try:
        local = os.path.join(path, name)
        if not os.path.isdir(path):
            local = hf_hub_download(path, name, revision=revision)
        content = json.loads(Path(local).read_text("utf-8"))
    except _UNANSWERED:
        return {}
    return content if isinstance(content, dict) else {}


def component_files(path: str, revision: str | None = None) -> list[str]:
    """Relative paths of all files of the pipeline's components; none if the Hub is not asked."""
    if os.path.isdir(path):
        return [file.relative_to(path).as_posix() for file in Path(path).glob("*/*")]
    return _hub_files(path, revision)


@lru_cache(maxsize=4)  # wanted several times at the start, each time a request
def _hub_files(path: str, revision: str | None) -> list[str]:
    try:
        return HfApi().list_repo_files(path, revision=revision)
    except _UNANSWERED:
        return []


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of every component that a model_index.json names; lists of numbers are
    settings."""
    entries = {name: entry for name, entry in index.items() if name != "_class_name"}
    return {
        name: (str(entry[0]), str(entry[-1]))
        for name, entry in entries.items()
        if isinstance(entry, list | tuple)
        and entry
        and not isinstance(entry[0], int | float | None)
    }


def check_classes(path: str, revision: str | None = None) -> None:
    """Refuse a pipeline whose parts are of other classes than its model_index.json says.

    Raises:
        UsageError: the component and both classes.
    """
    faults = []
    for name, (_, listed) in components(read_json_file(path, revision, INDEX)).items():
        own = read_json_file(path, revision, f"{name}/config.json").get("_class_name")
        if own is not None and _FORMER.get(own, own) != _FORMER.get(listed, listed):
            faults.append(f"{name} is a {listed} in {INDEX}, and a {own} in {name}/config.json")
    if faults:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r}: {'; '.join(faults)}. Correct the one that "
            "is wrong, or save the pipeline again."
        )


def variants(
    path: str, revision: str | None, variant: str | None, parts: Collection[str]
) -> dict[str, str | None]:
    """The variant to load each of the ``parts`` in: the one asked for where a part has files of it,
    and none for the others, as diffusers loads a whole pipeline.

    Raises:
        UsageError: no part has files of it; the message names the variants that there are.
    """
    files = [PurePosixPath(file) for file in component_files(path, revision)]
    weights = [(f.parts[0], variant_of(f.name)) for f in files if f.suffix == ".safetensors"]
    if variant is None or not weights:  # or the Hub does not answer: the loader tells
        return dict.fromkeys(parts, variant)
    having = {part for part, mark in weights if mark == variant and part in parts}
    if not having:
        known = sorted({mark for part, mark in weights if mark and part in parts})
        raise UsageError(
            f"--variant {variant}: no weights of {path!r} are of it: "
            + (f"give {' or '.join(known)}, or leave it out." if known else "leave it out.")
        )
    return {part: variant if part in having else None for part in parts}
