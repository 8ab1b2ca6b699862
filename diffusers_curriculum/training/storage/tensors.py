"""State as safetensors and strict JSON: exact to the bit, and reading it runs no code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from diffusers_curriculum.training.errors import CheckpointError

# JSON objects with one of these as their only key stand for what JSON lacks.
_TENSOR, _TUPLE, _FLOAT, _DICT = "$tensor", "$tuple", "$float", "$dict"


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], **told: str) -> None:
    """Write named tensors to a safetensors file, from any device, with any strides.

    Tensors that share memory are written once each: what is loaded shares nothing.

    Args:
        told: what the file tells of itself besides, as text.
    """
    save_file(_separate(tensors), path, metadata={"format": "pt", **told})
    if told:
        _order_header(Path(path))


def tensor_bytes(tensors: Mapping[str, Tensor], **told: str) -> bytes:
    """What :func:`save_tensors` writes, of a file that tells at most one thing of itself."""
    return save(_separate(tensors), metadata=told)


def _order_header(file: Path) -> None:
    """Write the header of a safetensors file in the order of its keys: safetensors has what is told
    in any order, and two files of the same content would differ."""
    with file.open("r+b") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        content.seek(8)
        content.write(text.encode().ljust(size))


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU of which no two share memory (safetensors refuses those)."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        address = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return ready


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file into memory; the tensors do not depend on the file any more."""
    try:
        # Cloned, because the loaded ones may be windows into the mapped file.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN, no Infinity); floats keep every bit."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} instead of an object.")
    return content


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Turn nested state into JSON; tensors go into ``tensors``, their names begin with ``name``.

    :func:`unpack` gives the same back: tuples stay tuples, integer keys integers, infinities and
    NaNs themselves.

    Raises:
        CheckpointError: something is neither a tensor, a number, a string, None nor a list, tuple
            or dict of those.
    """
    if isinstance(value, Tensor):
        while name in tensors:
            name += "_"
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return _pack_dict(value, tensors, name)
    if type(value) in (list, tuple):
        items = [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which no checkpoint can hold: state must be made of "
        "tensors, plain numbers, strings, None, and lists, tuples and dicts of them."
    )


def _pack_dict(value: dict[Any, Any], tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: pack(item, tensors, f"{name}.{key}") for key, item in value.items()}
    pairs = [
        [pack(key, tensors, name), pack(item, tensors, f"{name}.{key}")]
        for key, item in value.items()
    ]
    return {_DICT: pairs}


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`pack`; a missing tensor is a CheckpointError."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) != 1 or not next(iter(packed)).startswith("$"):
        return {key: unpack(item, tensors) for key, item in packed.items()}
    tag, content = next(iter(packed.items()))
    return _untag(tag, content, tensors)


def _untag(tag: str, content: Any, tensors: Mapping[str, Tensor]) -> Any:
    if tag == _TENSOR and content in tensors:
        return tensors[content]
    if tag == _TUPLE:
        return tuple(unpack(item, tensors) for item in content)
    if tag == _FLOAT:
        return float(content)
    if tag == _DICT:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    raise CheckpointError(f"The checkpoint's state refers to {tag} {content!r}, which is missing.")


def conform(saved: Any, live: Any, where: str) -> Any:
    """Give ``saved`` back with its tensors on the devices of those in ``live``.

    Raises:
        CheckpointError: tensors differ in shape or dtype, or dicts at the top in their keys.
    """
    if not isinstance(live, dict):
        return _conform_value(saved, live, where)
    found = set(saved) if isinstance(saved, dict) else set()
    if found != set(live):
        raise CheckpointError(
            f"The checkpoint's {where} does not fit this run: it has {sorted(map(str, found))}, "
            f"the run needs {sorted(map(str, live))}. Resume with the arguments of the run that "
            "wrote it."
        )
    return {key: _conform_value(saved[key], live[key], f"{where}.{key}") for key in saved}


def _conform_value(saved: Any, live: Any, where: str) -> Any:
    if isinstance(saved, Tensor) and isinstance(live, Tensor):
        check_like(saved, live, where)
        return saved.to(live.device)
    if isinstance(saved, dict) and isinstance(live, dict):
        common = saved.keys() & live.keys()
        return saved | {key: _conform_value(saved[key], live[key], where) for key in common}
    return saved


def check_like(saved: Tensor, live: Tensor, where: str) -> None:
    """Refuse a tensor of another shape or dtype than the run's."""
    if saved.shape == live.shape and saved.dtype == live.dtype:
        return
    raise CheckpointError(
        f"The checkpoint's {where} has shape {tuple(saved.shape)} and {saved.dtype}, this run's "
        f"has {tuple(live.shape)} and {live.dtype}. Resume with the model and the arguments of "
        "the run that wrote it."
    )


def check_tensors(saved: Mapping[str, Tensor], live: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that do not match the run's by name, shape and dtype, at the first that does
    not."""
    odd = sorted(saved.keys() ^ live.keys())
    if odd:
        side = "checkpoint" if odd[0] in saved else "run"
        raise CheckpointError(
            f"{where}: {len(odd)} tensors differ by name; {odd[0]} is only in the {side}. Resume "
            "with the model of the run that wrote the checkpoint."
        )
    for name, tensor in saved.items():
        check_like(tensor, live[name], f"{where}: {name}")


def on_device_of(value: Tensor, like: Tensor) -> Tensor:
    """A new tensor with the values and dtype of ``value``, the device and layout of ``like``."""
    if value.shape != like.shape:
        return value.to(like.device, copy=True)
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
