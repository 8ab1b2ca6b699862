"""Samplers as files: a config as JSON and, of one that learns, its state as safetensors; in a
folder or a repository on the Hub, alone or in the folder ``timestep_sampler`` of a pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from diffusers.utils import PushToHubMixin, _get_model_file
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FOLDER = "timestep_sampler"  # in a pipeline's
CONFIG, STATE = "timestep_sampler_config.json", "timestep_sampler_state.safetensors"
_NUMBERS = "numbers"  # those of a state that are no tensors, in the header of its file


class Stored(PushToHubMixin):
    """A sampler that can be saved, loaded and pushed to the Hub (``push_to_hub``) as models of
    diffusers can."""

    load_config: Callable[..., Any]
    from_config: Callable[..., Any]
    save_config: Callable[..., None]
    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[Mapping[str, Any]], None]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``timestep_sampler_config.json`` into ``save_directory`` and, of a sampler that
        learns, its state as ``timestep_sampler_state.safetensors``."""
        os.makedirs(save_directory, exist_ok=True)
        _write_state(Path(save_directory, STATE), self.state_dict())
        self.save_config(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str, *, subfolder: str | None = None, **hub: Any) -> Self:
        """The sampler in a folder or a repository on the Hub, with what it has learned;
        ``_class_name`` picks the class. No code is executed but this package's.

        Args:
            path: the folder or repository, of a pipeline too.
            subfolder: of it; by default ``timestep_sampler``, where there is one.
            hub: revision, token, cache_dir, force_download, local_files_only, as in diffusers.

        Raises:
            ValueError: not a sampler of this class.
            OSError: there is none, or its state is missing, or the Hub cannot be reached.
        """
        config, folder = cls._find_config(path, subfolder, hub)
        sampler = cls.from_config(config)
        if not any(isinstance(value, Tensor) for value in sampler.state_dict().values()):
            return sampler
        if os.path.isdir(path):
            file = Path(path, folder or "", STATE)
            if not file.is_file():  # it has not learned yet
                return sampler
        else:
            file = Path(_get_model_file(path, weights_name=STATE, subfolder=folder, **hub))
        sampler.load_state_dict(_read_state(file))
        return sampler

    @classmethod
    def _find_config(cls, path: str, subfolder: str | None, hub: dict[str, Any]) -> tuple[Any, Any]:
        """The config, and the folder in which it was."""
        if subfolder is None and os.path.isdir(path):
            subfolder = FOLDER if Path(path, FOLDER, CONFIG).is_file() else ""
        if subfolder is None:
            with suppress(OSError):  # what is wrong with the place is told of the place itself
                return cls.load_config(path, subfolder=FOLDER, **hub), FOLDER
        return cls.load_config(path, subfolder=subfolder, **hub), subfolder


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state that holds tensors; one of numbers alone is no file."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        path.unlink(missing_ok=True)
        return
    numbers = {name: value for name, value in state.items() if name not in tensors}
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # with the permissions of any file that a program opens; those of save_file are the owner's
    path.write_bytes(save(ready, metadata={_NUMBERS: json.dumps(numbers, sort_keys=True)}))


def _read_state(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            numbers = json.loads((file.metadata() or {})[_NUMBERS])
            return numbers | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no state of a sampler: {error!r}.") from error
