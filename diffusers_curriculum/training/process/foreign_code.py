"""Refuses a base model that brings code of its own, or names code to fetch, before it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Any

from diffusers import pipelines

from diffusers_curriculum.models.loading import LIBRARIES, PART_MODULES
from diffusers_curriculum.pipelines.self_contained import is_own_pipeline
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process.pipeline_files import (
    INDEX,
    component_files,
    components,
    read_json_file,
)

_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


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
    index, files = read_json_file(path, revision, INDEX), component_files(path, revision)
    name = index.get("_class_name", "")
    plain = isinstance(name, str) or is_own_pipeline(name)  # what is its own is not read there
    faults = [] if plain else ["the pipeline is a module"]
    for part, (library, kind) in components(index).items():
        inside = {file for file in files if file.startswith(f"{part}/")}
        config = read_json_file(path, revision, f"{part}/config.json")
        own = PART_MODULES.get(kind, ("", ""))
        faults += _faults(part, own[1] if library == own[0] else library, inside, config)
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
    if library not in LIBRARIES and not hasattr(pipelines, library):
        yield f"{name} is a class of {library!r}"
    elif f"{name}/{library}.py" in files:
        yield f"{name} brings a module named {library}.py"
    kinds = {PurePosixPath(file).suffix for file in files}
    if kinds & _PICKLES and ".safetensors" not in kinds:
        yield f"{name} has its weights in a pickle only"
    for key in _KERNELS:
        if "/" in str(config.get(key, "")):
            yield f"{name} asks for the kernel {config[key]!r}"
