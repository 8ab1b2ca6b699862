"""Reading saved diffusers models, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from packaging import version
from torch import nn

# The keyword of from_pretrained; diffusers renamed it and deprecated the old name.
DTYPE = "dtype" if version.parse(diffusers.__version__) >= version.parse("0.40") else "torch_dtype"


# Classes of parts that diffusers has not: the module in a saved part's folder, and the one here.
PART_MODULES = {
    "ViTVQModel": ("vit_vq", "diffusers_curriculum.models.vit_vq"),
    "ImageTokenTransformer": ("image_tokens", "diffusers_curriculum.models.image_tokens"),
    "TwoTimesUNet2DModel": ("two_times", "diffusers_curriculum.models.two_times"),
    "TwoTimesDiTTransformer2DModel": ("two_times", "diffusers_curriculum.models.two_times"),
}
LIBRARIES = {"diffusers", "transformers", *(module for _, module in PART_MODULES.values())}


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
    **more: Any,
) -> Any:
    """Load a diffusers model of class `kind`, from safetensors only; a ValueError says that it
    cannot be loaded, or lacks weights. `more` goes to its `from_pretrained`."""
    with loading(path, subfolder or kind.__name__):
        where, inner = _inside(path, subfolder)
        settings = {"revision": revision, "variant": variant, "subfolder": inner, DTYPE: dtype}
        given = {name: value for name, value in settings.items() if value is not None}
        return load_whole(kind, where, **given, **more)[0]


def load_whole(
    kind: Any, path: str, *, may_lack: tuple[str, ...] = (), **settings: Any
) -> tuple[Any, set[str]]:
    """Load a model of diffusers or transformers, from safetensors only, and all of it.

    Both libraries leave a weight that is not in the files at random, or on no device.

    Args:
        may_lack: beginnings of the names of weights that are not needed.

    Returns:
        The model, and the names of those that are not there.

    Raises:
        ValueError: other weights are missing, or have no place; the message names some.
    """
    model, found = kind.from_pretrained(
        path, use_safetensors=True, output_loading_info=True, **settings
    )
    missing = set(found["missing_keys"])
    lost = sorted(name for name in missing if not name.startswith(may_lack))
    if lost:
        raise ValueError(
            f"{len(lost)} of its weights are not in its file, such as {_some(lost)}"
            + _instead(found["unexpected_keys"])
        )
    return model, missing


def load_pipeline(kind: Any, folder: str | Path, **more: Any) -> Any:
    """Load a saved pipeline of class `kind` whose parts have all of their weights; a ValueError
    names the part that has not. `more` goes to its `from_pretrained`."""
    whole = {}
    for name, entry in kind.load_config(str(folder)).items():
        known = isinstance(entry, list | tuple) and entry[0] in LIBRARIES
        part = getattr(import_module(entry[0]), entry[1]) if known else None
        if name not in more and isinstance(part, type) and issubclass(part, nn.Module):
            whole[name] = load_model(part, str(folder), subfolder=name)
    return kind.from_pretrained(str(folder), **(whole | more))


def _instead(names: Iterable[str]) -> str:
    strangers = sorted(names)
    return f", which holds {_some(strangers)} instead" if strangers else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3])


def _inside(path: str, subfolder: str | None) -> tuple[str, str | None]:
    # diffusers reads the folder above where a subfolder on disk has no config
    if subfolder and Path(path).is_dir():
        return str(Path(path) / subfolder), None
    return str(path), subfolder
