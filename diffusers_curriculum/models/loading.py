"""Reading saved diffusers models, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from packaging import version

# The keyword of from_pretrained; diffusers renamed it and deprecated the old name.
DTYPE = "dtype" if version.parse(diffusers.__version__) >= version.parse("0.40") else "torch_dtype"


class _Config(ConfigMixin):
    """Reads the config of any model: the models' own classes take seconds to import."""

    config_name = "config.json"


@contextmanager
def loading(path: str, what: str) -> Iterator[None]:
    """Turn what diffusers and the Hub raise into a ValueError that names the path."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path!r}: its {what} cannot be loaded ({error}). Give a folder or Hub id saved by "
            "diffusers with safetensors weights, and check the revision, variant and subfolder."
        ) from error


def read_config(
    path: str, revision: str | None = None, subfolder: str | None = None
) -> dict[str, Any]:
    """Return the config of a saved model: a JSON file, a folder with config.json, or a Hub id. A
    ValueError says that there is none, or that it is not a JSON object."""
    with loading(path, "config.json"):
        where, inner = _inside(path, subfolder)
        config: Any = _Config.load_config(where, revision=revision, subfolder=inner)
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__} instead of an object")
    return config


def load_model(
    kind: Any,
    path: str,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a diffusers model of class `kind`, from safetensors only; a ValueError says that it
    cannot be loaded, or lacks weights."""
    with loading(path, kind.__name__):
        where, inner = _inside(path, subfolder)
        settings = {"revision": revision, "variant": variant, "subfolder": inner, DTYPE: dtype}
        model, found = kind.from_pretrained(
            where, use_safetensors=True, output_loading_info=True, **settings
        )
        missing = found["missing_keys"]
        if missing:  # diffusers would leave them random
            some = ", ".join(sorted(missing)[:3])
            raise ValueError(f"{len(missing)} weights are not in its file, such as {some}")
        return model


def _inside(path: str, subfolder: str | None) -> tuple[str, str | None]:
    # diffusers reads the folder above where a subfolder on disk has no config
    if subfolder and Path(path).is_dir():
        return str(Path(path) / subfolder), None
    return str(path), subfolder
