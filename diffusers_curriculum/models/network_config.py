"""Configs of networks: by name or from a file, completed and checked against what is asked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_curriculum.checks import finite, whole
from diffusers_curriculum.models.loading import PART_MODULES, read_config

# The UNet of diffusers' train_unconditional.py.
UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
DIT_PIPELINE_CLASSES = 1000  # DiTPipeline takes class 1000 as the null class, whatever the network


class DiTSize(NamedTuple):
    """Depth, width and attention heads of one row of table 1."""

    layers: int
    width: int
    heads: int


DIT_SIZES: Mapping[str, DiTSize] = {
    "S": DiTSize(12, 384, 6),
    "B": DiTSize(12, 768, 12),
    "L": DiTSize(24, 1024, 16),
    "XL": DiTSize(28, 1152, 16),
}
# Whole numbers from 1 on, and the largest that a network is built with
_SIZES: dict[str, int] = dict.fromkeys(("num_layers", "layers_per_block"), 1024)
_SIZES |= dict.fromkeys(("num_attention_heads", "attention_head_dim", "patch_size"), 65_536)
_SIZES |= dict.fromkeys(("norm_num_groups", "block_out_channels"), 65_536)
TWO_TIMES_NAMES = tuple(name for name, (part, _) in PART_MODULES.items() if part == "two_times")
_DIT_NAME = re.compile(r"DiT-(\w+)/(\d+)")


class Asked(NamedTuple):
    """What a training asks of its network; None: whatever the config says."""

    channels: int
    out_channels: int | None
    sample_size: int
    num_classes: int | None


def dit_config(name: str) -> dict[str, Any] | None:
    """Return the config of "DiT-<S, B, L or XL>/<patch size>", None for a name of another form; a
    ValueError refuses a size that arXiv 2212.09748 does not have, and a patch size of 0."""
    match = _DIT_NAME.fullmatch(name)
    if match is None:
        return None
    size, patch = DIT_SIZES.get(match[1]), int(match[2])
    if size is None or patch < 1:
        raise ValueError(
            f"{name!r} is no DiT: its size is one of {', '.join(DIT_SIZES)} and its patch size 1 "
            "or more, as in DiT-B/2."
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": size.layers,
        "num_attention_heads": size.heads,
        "attention_head_dim": size.width // size.heads,
        "patch_size": patch,
    }


def network_class(config: dict[str, Any], source: str) -> Any:
    """Return the class of a config, or raise ValueError for another one; without `_class_name`, as
    in diffusers' train_unconditional.py, it is a UNet2DModel. Old DiT checkpoints call themselves
    Transformer2DModel."""
    from diffusers import DiTTransformer2DModel, UNet2DModel  # here, as they take seconds

    name = config.get("_class_name") or "UNet2DModel"
    if name in TWO_TIMES_NAMES:
        return getattr(import_module(PART_MODULES[name][1]), name)
    if name == "UNet2DModel":
        return UNet2DModel
    old_dit = name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    if name == "DiTTransformer2DModel" or old_dit:
        return DiTTransformer2DModel
    raise ValueError(
        f"{source!r} is of class {name}, norm_type {config.get('norm_type')!r}: give a "
        "UNet2DModel, a DiTTransformer2DModel or a Transformer2DModel with norm_type "
        "'ada_norm_zero' (of a pipeline: its subfolder 'unet' or 'transformer')."
    )


def complete_config(
    source: str, asked: Asked, revision: str | None = None, subfolder: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return the class and the whole config of a network, of which `source` is the name ("DiT-B/2"
    and the like, "UNet"), a JSON file, a folder or a Hub id.

    A ValueError refuses unknown names, a config that contradicts `asked`, sizes that do not fit.
    """
    raw = _read(source, revision, subfolder)
    kind = network_class(raw, source)
    config = _own_settings(raw, kind, source)
    _check_numbers(config, kind, source)
    if isinstance(config.get("sample_size"), list | tuple):
        sides = set(config["sample_size"])
        config["sample_size"] = sides.pop() if len(sides) == 1 else tuple(config["sample_size"])
    _fill(config, "in_channels", asked.channels, source)
    _fill(config, "sample_size", asked.sample_size, source)
    _fill_outputs(config, asked, source)
    fill = _fill_dit if kind.__name__.endswith("DiTTransformer2DModel") else _fill_unet
    fill(config, asked, source)
    return kind, config


def _read(source: str, revision: str | None, subfolder: str | None) -> dict[str, Any]:
    if source == "UNet":
        return dict(UNET_CONFIG)
    named = None if Path(source).exists() else dit_config(source)
    return dict(read_config(source, revision, subfolder)) if named is None else named


def _own_settings(config: dict[str, Any], kind: Any, source: str) -> dict[str, Any]:
    """The settings that `kind` takes."""
    known = inspect.signature(kind.__init__).parameters
    own = {key: value for key, value in config.items() if key in known}
    foreign = [key for key in config if key not in known and not key.startswith("_")]
    # old DiT configs list the settings of all of Transformer2DModel's uses
    if config.get("_class_name") != "Transformer2DModel" and foreign:
        raise ValueError(
            f"{source!r} has settings that a {kind.__name__} does not take: {', '.join(foreign)}. "
            "Remove them, or correct its _class_name."
        )
    return own


def _check_numbers(config: dict[str, Any], kind: Any, source: str) -> None:
    """Refuse what is no number where the class has one by default, and sizes of no network."""
    known = inspect.signature(kind.__init__).parameters
    given = {key: value for key, value in config.items() if value is not None}
    for key in given.keys() & _SIZES.keys():
        sizes = given[key] if isinstance(given[key], list | tuple) else [given[key]]
        for size in sizes or [0]:
            whole(f"{source!r}: {key}", size, 1, _SIZES[key])
    for key in given.keys() - {*_SIZES, "sample_size"}:  # which may be two
        if type(known[key].default) in (int, float):
            finite(f"{source!r}: {key}", given[key])


def _fill(config: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set `key`, or raise ValueError where the config says another value."""
    if config.get(key) not in (None, value):
        raise ValueError(
            f"{source!r} says {key}={config[key]}, but {value} is asked for: change or remove it "
            "in the config, or change the resolution or the autoencoder."
        )
    config[key] = value


def _fill_outputs(config: dict[str, Any], asked: Asked, source: str) -> None:
    allowed = (asked.channels, 2 * asked.channels)
    if asked.out_channels is not None:
        _fill(config, "out_channels", asked.out_channels, source)
    found = config.get("out_channels") or asked.channels
    if found not in allowed:
        raise ValueError(
            f"{source!r}: out_channels={found} fits no input of {asked.channels} channels: take "
            f"{allowed[0]}, or {allowed[1]} with a learned variance."
        )
    config["out_channels"] = found


def _fill_dit(config: dict[str, Any], asked: Asked, source: str) -> None:
    patch = config.get("patch_size") or 2
    if asked.sample_size % patch:
        raise ValueError(
            f"{source!r}: patch_size={patch} does not divide the {asked.sample_size} x "
            f"{asked.sample_size} input: choose another patch size or resolution."
        )
    classes = asked.num_classes
    rows = 0 if classes is None else max(DIT_PIPELINE_CLASSES, classes)
    _fill_rows(config, "num_embeds_ada_norm", rows, classes or 0, source)


def _fill_unet(config: dict[str, Any], asked: Asked, source: str) -> None:
    levels = len(config.get("block_out_channels") or range(4))
    multiple = 2 ** (levels - 1)
    if asked.sample_size % multiple:
        raise ValueError(
            f"{source!r}: {levels} levels do not halve the {asked.sample_size} x "
            f"{asked.sample_size} input evenly: choose a multiple of {multiple}, or fewer levels."
        )
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"{source!r} says class_embed_type={config['class_embed_type']!r}: take null, which "
            "looks classes up in a table."
        )
    if asked.num_classes is not None:
        rows = asked.num_classes + 1
        _fill_rows(config, "num_class_embeds", rows, rows, source)


def _fill_rows(config: dict[str, Any], key: str, rows: int, needed: int, source: str) -> None:
    found = config.get(key)
    if found is None:
        config[key] = rows
    elif found < needed:
        raise ValueError(
            f"{source!r} says {key}={found}, but the data need {needed}: raise it or remove it."
        )
