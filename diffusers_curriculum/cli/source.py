"""Where a preview gets its schedule from: files, folders, the Hub; no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SAMPLER_FILE = "timestep_sampler_config.json"
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
    sampler that it was trained with).

    Raises:
        ValueError: nothing of the kind is there; one line with the remedy.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _from_config(_read(path), name)
    if not path.is_dir():
        return _from_hub(name)
    scheduler = _first(path / "scheduler" / SCHEDULER_FILE, path / SCHEDULER_FILE)
    sampler = _read(path / SAMPLER_FILE) if (path / SAMPLER_FILE).is_file() else None
    if scheduler is not None:
        return _from_config(_read(scheduler), name)._replace(sampler=sampler)
    if sampler is not None:
        return _from_config(sampler, name)
    raise ValueError(f"{name}: the folder holds neither a scheduler nor a sampler. {_REMEDY}")


def _from_config(config: Mapping[str, Any], name: str) -> Source:
    """A source from the config of a scheduler or of a sampler."""
    import diffusers

    from diffusers_curriculum.noise_levels import NoiseLevels
    from diffusers_curriculum.samplers import TimestepSampler
    from diffusers_curriculum.samplers.description import build_scheduler

    if config.get("_class_name") in TimestepSampler.kinds():
        return Source(None, None, config)
    if "_class_name" not in config:
        raise ValueError(f"{name}: its config says no _class_name. {_REMEDY}")
    own = build_scheduler(config)
    # as the training script does, and diffusers' own: noise is added by DDPM
    preserving = NoiseLevels.from_scheduler(own).family == "vp"
    training = diffusers.DDPMScheduler.from_config(own.config) if preserving else own
    return Source(training, own, None)


def _from_hub(name: str) -> Source:
    """The scheduler of a pipeline, or the scheduler itself, in a repository on the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        file = hf_hub_download(name, SCHEDULER_FILE, subfolder="scheduler")
    except HFValidationError:
        raise ValueError(f"{name}: there is no such file or folder. {_REMEDY}") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{name}: there is no such file or folder, and the Hub cannot be reached (offline, and "
            "not in the cache): check the name, connect, or give a local folder."
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name}: there is no such file, folder or repository on the Hub; a private one needs "
            "`hf auth login`."
        ) from None
    except EntryNotFoundError:
        raise ValueError(f"{name}: this repository has no scheduler. {_REMEDY}") from None
    except HfHubHTTPError as error:
        raise ValueError(f"{name}: the Hub answered {_one_line(error)}: try again.") from None
    return _from_config(_read(Path(file)), name)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise ValueError(f"{path}: this is no JSON file. {_REMEDY}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: this holds no config. {_REMEDY}")
    return content


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
