"""What is saved can be read by whom the umask lets."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusers_curriculum.models.saving import share_weights
from diffusers_curriculum.models.tiny import MINUSCULE, make_tiny_pipeline
from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint
from diffusers_curriculum.training.storage.tensors import save_tensors

MASKS = {0o022: 0o644, 0o027: 0o640, 0o002: 0o664, 0o077: 0o600}


@pytest.fixture(params=MASKS, ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """What a new file may be, under an umask."""
    before = os.umask(request.param)
    yield MASKS[request.param]
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}


def _tiny(folder: Path) -> None:
    make_tiny_pipeline(None, folder, resolution=8, vae_steps=0, sizes=MINUSCULE)


def _checkpoint(folder: Path) -> None:
    def write(inside: Path) -> None:
        save_tensors(inside / "optimizer.safetensors", {"a": torch.ones(2)})
        (inside / "unet").mkdir()
        save_tensors(inside / "unet" / "model.safetensors", {"a": torch.ones(2)})

    save_checkpoint(folder, 1, write, {})


@pytest.mark.parametrize("save", [_tiny, _checkpoint])
def test_saved_files_have_the_usual_permissions(
    tmp_path: Path, mode: int, save: Callable[[Path], Any]
) -> None:
    save(tmp_path / "saved")
    assert modes(tmp_path / "saved") == {mode}


def test_other_permissions_and_links_are_left(tmp_path: Path, mode: int) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "chosen.safetensors")
    (tmp_path / "chosen.safetensors").chmod(0o604)
    save_file({"a": torch.ones(2)}, tmp_path / "private.txt")
    (tmp_path / "private.txt").chmod(0o600)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "private.txt")
    share_weights(tmp_path)
    assert stat.S_IMODE((tmp_path / "chosen.safetensors").stat().st_mode) == 0o604
    assert stat.S_IMODE((tmp_path / "private.txt").stat().st_mode) == 0o600
    assert len([*tmp_path.iterdir()]) == 3
