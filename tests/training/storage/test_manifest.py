"""Any damage to a checkpoint is detected, and the file is named."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint, verify_checkpoint
from diffusers_curriculum.training.errors import CheckpointError
from diffusers_curriculum.training.storage.manifest import MANIFEST, _with_digest
from tests.training.small_checkpoints import save


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "half", data[: len(data) // 2]
    yield "one byte short", data[:-1]
    yield "one byte more", data + b"\n"


def test_truncation_of_any_file_is_detected_and_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        original = path.read_bytes()
        for what, damaged in damages(original):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                verify_checkpoint(folder)
            assert str(path.relative_to(folder)) in str(caught.value), what
        path.write_bytes(original)
    verify_checkpoint(folder)


def test_flipped_bits_of_the_manifest_are_detected(tmp_path: Path) -> None:
    """All of the facts' bits, because some leave the parsed content as it was (1e-30, 1E-30)."""
    facts = {"tiny": 1e-30, "name": "\u00e9"}
    path = save_checkpoint(tmp_path, 1, lambda folder: None, facts) / MANIFEST
    original = path.read_bytes()
    assert b"1e-30" in original
    assert b"\\u00e9" in original
    first, last = original.index(b'"facts"'), original.index(b'"files"')
    bits = {*range(8 * first, 8 * last), *range(0, 8 * len(original), 5)}
    unseen = [bit for bit in bits if not is_flip_seen(path, original, bit)]
    assert unseen == []


def is_flip_seen(path: Path, original: bytes, bit: int) -> bool:
    flipped = bytearray(original)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        verify_checkpoint(path.parent)
    except CheckpointError as error:
        return MANIFEST in str(error)
    return False


def test_flipped_bits_in_other_files_are_detected_and_named(tmp_path: Path) -> None:
    folder, generator = save(tmp_path, 1), random.Random(0)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    for _ in range(60):
        path = generator.choice(files)
        original = path.read_bytes()
        flipped = bytearray(original)
        flipped[generator.randrange(len(original))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{path.relative_to(folder)} has another sha256"):
            verify_checkpoint(folder)
        path.write_bytes(original)


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").unlink()
    (folder / "unet/config.json").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"state.json is missing; unet/config.json has 1 byte"
    ):
        verify_checkpoint(folder)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    body = json.loads((folder / MANIFEST).read_text())
    del body["digest"]
    for name in ("../checkpoint-1/state.json", "/etc/hostname"):
        text = _with_digest(body | {"files": {name: body["files"]["state.json"]}})
        (folder / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=MANIFEST):
            verify_checkpoint(folder)


def test_a_manifest_of_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    body = json.loads((folder / MANIFEST).read_text())
    del body["digest"]
    (folder / MANIFEST).write_text(_with_digest(body | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        verify_checkpoint(folder)
