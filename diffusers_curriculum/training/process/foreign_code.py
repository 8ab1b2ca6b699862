"""Refuses a base model that brings code of its own, or names code to fetch, before it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers import pipelines
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from diffusers_curriculum.training.errors import UsageError

_LIBRARIES = {"diffusers", "transformers", "diffusers_curriculum.models.vit_vq"}
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_UNANSWERED = (OSError, ValueError, EntryNotFoundError, HfHubHTTPError, HFValidationError)


def refuse_foreign_code(path: str, revision: str | None = None) -> None:
    """Check what model_index.json and the configs of a pipeline would have the libraries import;
    ``path`` is its folder or its name on the Hub.

    Newer diffusers and transformers refuse most of it themselves; this holds for all versions that
    are supported, and at the start instead of at the export. What the Hub does not answer is left
    to them.

    Raises:
        UsageError: a class that is not from diffusers or transformers, a module in a component's
            folder that stands in for one, an attention kernel from the Hub, or weights that only a
            pickle holds; the message names the component.
    """
    index, files = _read_json(path, revision, "model_index.json"), _files(path, revision)
    faults = [] if isinstance(index.get("_class_name", ""), str) else ["the pipeline is a module"]
    for name, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] is not None and name != "_class_name":
            inside = {file for file in files if file.startswith(f"{name}/")}
            config = _read_json(path, revision, f"{name}/config.json")
            faults += _faults(name, str(entry[0]), inside, config)
    if faults:
        raise UsageError(
            f"--pretrained_model_name_or_path {path!r} would run or unpickle what it brings along, "
            f"which is never done: {'; '.join(faults)}. Use a pipeline whose components are "
            "classes of diffusers and transformers, with weights in safetensors; older weights "
            "become so by StableDiffusionPipeline.from_pretrained(...).save_pretrained(FOLDER)."
        )


def _faults(
    name: str, library: str, files: Collection[str], config: dict[str, Any]
) -> Iterator[str]:
    """What is wrong with a component, given its library, the files in its folder and its config."""
    if library not in _LIBRARIES and not hasattr(pipelines, library):
        yield f"{name} is a class of {library!r}"
    elif f"{name}/{library}.py" in files:
        yield f"{name} brings a module named {library}.py"
    kinds = {PurePosixPath(file).suffix for file in files}
    if kinds & _PICKLES and ".safetensors" not in kinds:
        yield f"{name} has its weights in a pickle only"
    for key in _KERNELS:
        if "/" in str(config.get(key, "")):
            yield f"{name} asks for the kernel {config[key]!r}"


def _read_json(path: str, revision: str | None, name: str) -> dict[str, Any]:
    """A JSON file of the pipeline; empty where there is none, which the loader judges better."""
    try:
        local = os.path.join(path, name)
        if not os.path.isdir(path):
            local = hf_hub_download(path, name, revision=revision)
        content = json.loads(Path(local).read_text("utf-8"))
    except _UNANSWERED:
        return {}
    return content if isinstance(content, dict) else {}


def _files(path: str, revision: str | None) -> list[str]:
    """Relative paths of all files of the pipeline's components; none if the Hub is not asked."""
    if os.path.isdir(path):
        return [file.relative_to(path).as_posix() for file in Path(path).glob("*/*")]
    try:
        return HfApi().list_repo_files(path, revision=revision)
    except _UNANSWERED:
        return []
