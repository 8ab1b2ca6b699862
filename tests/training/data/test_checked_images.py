"""A remembered image is one that has not changed; a memory that is damaged costs time only."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path

import PIL
import pytest
from PIL import Image, ImageFile

from diffusers_curriculum.training.data.checked_images import (
    CheckedImages,
    image_key,
    read_checked,
    write_checked,
)
from diffusers_curriculum.training.storage import files


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 3), value).save(buffer, "PNG")
    return buffer.getvalue()


def file_cell(path: Path) -> dict:
    return {"path": str(path), "bytes": None}


def test_embedded_images_are_keyed_by_content_only():
    key = image_key({"path": None, "bytes": png(1)})
    assert key == image_key({"path": "elsewhere.png", "bytes": png(1)})
    assert key != image_key({"path": None, "bytes": png(2)})
    assert key is not None
    assert len(key) == 32


def test_the_key_of_a_file_changes_with_path_size_and_times(tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    for path in (one, two):
        path.write_bytes(png(1))
        os.utime(path, ns=(10**18, 10**18))
    before = image_key(file_cell(one))
    assert before == image_key(file_cell(one)) != image_key(file_cell(two))
    os.utime(one, ns=(10**18, 10**18 + 1))
    later = image_key(file_cell(one))
    assert later != before
    one.write_bytes(png(1) + b"0")
    os.utime(one, ns=(10**18, 10**18 + 1))
    assert image_key(file_cell(one)) not in (before, later)


def test_a_file_replaced_at_the_same_size_and_time_has_another_key(tmp_path):
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    path.write_bytes(png(1))
    os.utime(path, ns=(10**18, 10**18))
    before = image_key(file_cell(path))
    other.write_bytes(b"x" * len(png(1)))
    os.utime(other, ns=(10**18, 10**18))
    os.replace(other, path)
    assert image_key(file_cell(path)) != before


def test_a_relative_path_means_the_file_it_names(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(1))
    monkeypatch.chdir(tmp_path)
    assert image_key(file_cell(Path("a.png"))) == image_key(file_cell(tmp_path / "a.png"))


@pytest.mark.parametrize("cell", [None, {}, {"path": "", "bytes": None}, {"path": "no\0name"}])
def test_without_an_image_there_is_no_key(cell, tmp_path):
    assert image_key(cell) is None
    assert image_key(file_cell(tmp_path / "gone.png")) is None


def test_what_was_written_is_read_and_added_to(tmp_path, caplog):
    path = tmp_path / "checked.json"
    with caplog.at_level(logging.WARNING):
        nothing = read_checked(path, 8)
        assert nothing.keys == frozenset()
        write_checked(path, nothing, ["b", "a"])
        write_checked(path, read_checked(path, 8), ["c"])
        assert read_checked(path, 8).keys == {"a", "b", "c"}
    assert caplog.text == ""
    assert [p.name for p in tmp_path.iterdir()] == ["checked.json"]


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (PIL, "__version__", "0.1"),
        (Image, "MAX_IMAGE_PIXELS", 7),
        (ImageFile, "LOAD_TRUNCATED_IMAGES", True),
    ],
)
def test_a_check_of_another_kind_is_not_believed(tmp_path, monkeypatch, owner, name, value):
    path = tmp_path / "checked.json"
    write_checked(path, read_checked(path, 8), ["a"])
    assert read_checked(path, 16).keys == frozenset()
    assert read_checked(path, 8).keys == {"a"}
    monkeypatch.setattr(owner, name, value)
    assert read_checked(path, 8).keys == frozenset()


def test_damage_is_a_warning_and_the_next_write_repairs_it(tmp_path, caplog):
    path = tmp_path / "checked.json"
    write_checked(path, read_checked(path, 8), ["a" * 32, "b" * 32])
    whole = path.read_bytes()
    check = json.loads(whole)["check"]
    wrong = [{}, [], 7, None, {"check": check}, {"good": []}]
    wrong += [{"check": check, "good": value} for value in (None, 7, [1], [None], [["a"]])]
    damaged = [json.dumps(content).encode() for content in wrong]
    damaged += [whole[:length] for length in (0, 1, len(whole) // 2, len(whole) - 1)]
    damaged += [b"\xff\xfe" + whole, b"[" * 100_000]
    for content in damaged:
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_checked(path, 8).keys == frozenset()
        assert f"Ignoring {path}" in caplog.text
    write_checked(path, read_checked(path, 8), ["c"])
    assert read_checked(path, 8).keys == {"c"}


def test_any_flipped_bit_leaves_true_keys_only(tmp_path):
    path = tmp_path / "checked.json"
    keys = {"0123456789abcdef" * 2, "fedcba9876543210" * 2}
    write_checked(path, read_checked(path, 8), keys)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        found = read_checked(path, 8).keys
        # a flip in a key makes one that no image has; anywhere else, nothing is believed
        assert not found or (found & keys and len(found - keys) <= 1)


def test_a_folder_in_the_place_of_the_file_stops_nothing(tmp_path, caplog):
    path = tmp_path / "checked.json"
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        known = read_checked(path, 8)
        write_checked(path, known, ["a"])
    assert isinstance(known, CheckedImages)
    assert "Ignoring" in caplog.text
    assert "The next start checks all images again" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["checked.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, caplog, broken):
    path = tmp_path / "checked.json"
    write_checked(path, read_checked(path, 8), ["a"])
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, broken, fail)
    with caplog.at_level(logging.WARNING):
        write_checked(path, read_checked(path, 8), ["b"])
    assert "No space left" in caplog.text
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checked.json"]
