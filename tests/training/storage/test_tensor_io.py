"""Tensors and nested state come back from disk as they were."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_curriculum.training.errors import CheckpointError
from diffusers_curriculum.training.storage.tensors import (
    conform,
    load_tensors,
    on_device_of,
    pack,
    read_json,
    save_tensors,
    unpack,
    write_json,
)

BASE = torch.arange(24, dtype=torch.float32)
TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "view": BASE[4:8],
    "same view": BASE[4:8],
    "all": BASE,
    "transposed": BASE.reshape(4, 6).t(),
    "strided": BASE[::5],
    "expanded": torch.tensor([1.0]).expand(3),
    "channels last": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(
        memory_format=torch.channels_last
    ),
    "half": torch.tensor([1.0, math.nan, -math.inf], dtype=torch.float16),
    "brain": torch.tensor([1.0, -0.0], dtype=torch.bfloat16),
    "double": torch.tensor([1 / 3], dtype=torch.float64),
    "int": torch.tensor(2**62),
    "byte": torch.tensor([255], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS)
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        back = loaded[name]
        assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(back.nan_to_num(7), tensor.detach().nan_to_num(7)), name
        assert not back.requires_grad


def test_loaded_tensors_are_independent_of_the_file_and_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": BASE, "b": BASE})
    original = path.read_bytes()
    loaded = load_tensors(path)
    loaded["a"].zero_()
    assert torch.equal(loaded["b"], BASE)
    assert path.read_bytes() == original
    path.write_bytes(b"")
    assert torch.equal(loaded["b"], BASE)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {})
    assert load_tensors(tmp_path / "x.safetensors") == {}


@pytest.mark.parametrize("content", [None, b"", bytes(64), b"\xff" * 64, b"{}"])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read"):
        load_tensors(path)


def same(a: Any, b: Any) -> bool:
    """Equal in type too, with NaN equal to itself and -0.0 unlike 0.0."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, float):
        return isinstance(b, float) and a.hex() == b.hex()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def through_disk(value: Any, folder: Path) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    write_json(folder / "x.json", {"x": pack(value, tensors, "x")})
    save_tensors(folder / "x.safetensors", tensors)
    return unpack(read_json(folder / "x.json")["x"], load_tensors(folder / "x.safetensors"))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(BASE[:2])
KEYS = st.text(alphabet="$a.tensor0", max_size=3) | st.integers(0, 9)
STATE = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(value=STATE)
def test_nested_state_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    assert same(value, through_disk(value, tmp_path_factory.mktemp("x")))


@pytest.mark.parametrize(
    "value",
    [
        {"$tensor": "x"},
        {"$float": "nan"},
        {"$tuple": []},
        {"$": 1},
        {"a.b": BASE, "a": {"b": BASE[:3]}},
        {1: BASE, "1": BASE[:3]},
        OrderedDict(b=1, a=(1, (2.0, [math.nan]))),
        {True: 0, 2: 1},
    ],
)
def test_awkward_state_comes_back(tmp_path: Path, value: Any) -> None:
    assert same(value, through_disk(value, tmp_path))


@pytest.mark.parametrize("value", [{1, 2}, 1j, b"x", object(), Path("x"), [[torch.float32]]])
def test_other_types_are_refused_by_name(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"part\.key.* is a "):
        pack({"key": value}, {}, "part")


def test_strict_json_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"x": math.nan})
    for text in ("", "[]", "{", "\x00", "3"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"x\.json"):
            read_json(tmp_path / "x.json")


def test_a_missing_tensor_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"\$tensor 'gone'"):
        unpack(json.loads('{"a": [{"$tensor": "gone"}]}'), {})


def test_conform_refuses_other_keys_shapes_and_dtypes() -> None:
    live = {"a": torch.zeros(2), "b": None, "c": {"d": torch.zeros(1)}}
    good = {"a": torch.ones(2), "b": 3, "c": {"d": torch.ones(1), "e": 1}}
    assert same(conform(good, live, "x"), good)
    for change, match in (
        ({"z": 1}, r"x does not fit.*'z'"),
        ({"a": torch.ones(3)}, r"x\.a has shape \(3,\)"),
        ({"a": torch.ones(2, dtype=torch.float64)}, r"x\.a .*float64"),
        ({"c": {"d": torch.ones(2)}}, r"x\.c has shape"),
    ):
        with pytest.raises(CheckpointError, match=match):
            conform(good | change, live, "x")
    with pytest.raises(CheckpointError, match="does not fit"):
        conform([1], live, "x")


def test_values_take_the_layout_but_not_the_dtype() -> None:
    like = TENSORS["channels last"].requires_grad_()
    value = torch.arange(96, dtype=torch.float64).reshape(2, 3, 4, 4)
    placed = on_device_of(value, like)
    assert placed.stride() == like.stride() != value.stride()
    assert placed.dtype == torch.float64
    assert torch.equal(placed, value)
    assert not placed.requires_grad
