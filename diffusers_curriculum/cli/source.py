"""Where a preview gets its schedule from: files, folders, the Hub; no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SAMPLER_FILE = "timestep_sampler_config.json"
SAMPLER_FOLDER = "timestep_sampler"  # in a pipeline's; older runs have the file beside its index
SCHEDULER_FILE = "scheduler_config.json"
_REMEDY = (
    "Give a pipeline folder, a scheduler's folder or config file, a timestep_sampler_config.json, "
    "or the name of a pipeline on the Hub."
)


class Source(NamedTuple):
    """What was found.

    Attributes:
        training: the scheduler that adds noise in training.
        inference: the scheduler that samples, None where none is known.
        sampler: the config of a timestep sampler, None where there is none.
    """

    training: Any
    inference: Any
    sampler: Mapping[str, Any] | None


def read_source(name: str) -> Source:
    """Read ``name``: a file, a folder or a repository on the Hub.

    A folder may hold a sampler's config, a scheduler's, or a pipeline (and then the config of the
    sampler that it was trained with). A ValueError with the remedy says that nothing is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _from_config(_read(path), name)
    if not path.is_dir():
        return _from_config(_read(_from_hub(name)), name)
    places = [path / SAMPLER_FOLDER / SAMPLER_FILE, path / SAMPLER_FILE]
    sampler = next((_read(place) for place in places if place.is_file()), None)
    for file in (path / "scheduler" / SCHEDULER_FILE, path / SCHEDULER_FILE):
        if file.is_file():
            return _from_config(_read(file), name)._replace(sampler=sampler)
    if sampler is None:
        raise ValueError(f"{name}: the folder holds neither a scheduler nor a sampler. {_REMEDY}")
    return _from_config(sampler, name)


def _from_config(config: Mapping[str, Any], name: str) -> Source:
    import diffusers

    from diffusers_curriculum.noise_levels import NoiseLevels
    from diffusers_curriculum.samplers import SAMPLERS, TimestepSampler
    from diffusers_curriculum.samplers.description import build_scheduler

    if not hasattr(diffusers, str(config.get("_class_name"))):
        SAMPLERS.import_installed()
    if config.get("_class_name") in TimestepSampler.kinds():
        return Source(None, None, config)
    if "_class_name" not in config:
        raise ValueError(f"{name}: its config says no _class_name. {_REMEDY}")
    own = build_scheduler(config)
    # as the training script does, and diffusers' own: noise is added by DDPM
    preserving = NoiseLevels.from_scheduler(own).family == "vp"
    training = diffusers.DDPMScheduler.from_config(own.config) if preserving else own
    return Source(training, own, None)


def _from_hub(name: str) -> Path:
    """The config of the scheduler of a pipeline in a repository on the Hub."""
    from huggingface_hub import errors, hf_hub_download

    faults = {
        errors.HFValidationError: f"there is no such file or folder. {_REMEDY}",
        errors.LocalEntryNotFoundError: "there is no such file or folder, and the Hub cannot be "
        "reached (offline, and not in the cache): check the name, connect, or give a local folder.",
        errors.RepositoryNotFoundError: "there is no such file, folder or repository on the Hub; a "
        "private one needs `hf auth login`.",
        errors.EntryNotFoundError: f"this repository has no scheduler. {_REMEDY}",
    }
    try:
        return Path(hf_hub_download(name, SCHEDULER_FILE, subfolder="scheduler"))
    except (*faults, errors.HfHubHTTPError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        other = f"the Hub answered {first}: try again."
        fault = next((text for kind, text in faults.items() if isinstance(error, kind)), other)
        raise ValueError(f"{name}: {fault}") from None


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, "config", _REMEDY)


def read_object(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file, ``what`` it is; a ValueError says where there is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise ValueError(f"{path} is no JSON file. {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no {what}. {remedy}")
    return content
