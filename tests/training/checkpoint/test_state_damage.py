"""A damaged checkpoint changes nothing in a run, and reading one executes nothing."""

from __future__ import annotations

import logging
import os
import pickle  # noqa: TID251 - to see that it is never used
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.checkpoint.checkpoints import find_checkpoint, save_checkpoint
from diffusers_curriculum.training.checkpoint.state import TrainingState
from diffusers_curriculum.training.errors import CheckpointError
from tests.training.tiny_state import bits, make_state, train


def save(root: Path, state: TrainingState, step: int) -> Path:
    return save_checkpoint(root, step, partial(state.write, step=step), {"world_size": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after three steps; tests that change it take a copy."""
    state = make_state(0)
    train(state, 0, 3)
    return save(tmp_path_factory.mktemp("run"), state, 3)


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoint-3"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_files_are_these(saved: Path) -> None:
    assert [path.relative_to(saved).as_posix() for path in files_of(saved)] == [
        "manifest.json",
        "optimizer.safetensors",
        "sampler.safetensors",
        "tracker_mean.safetensors",
        "training_state.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet_ema/config.json",
        "unet_ema/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.reliability
def test_truncation_and_bitflip_detected(checkpoint: Path) -> None:
    """Every file cut to 0, half and all but one byte, and 200 random bits; nothing may change."""
    state, generator = make_state(1), random.Random(0)
    before = bits(state)
    files = files_of(checkpoint)
    cuts = [(path, cut) for path in files for cut in ("empty", "half", "short", "gone")]
    for path, how in [*cuts, *((generator.choice(files), "flip") for _ in range(200))]:
        original = path.read_bytes()
        damage(path, how, generator)
        with pytest.raises(CheckpointError) as caught:
            state.read(checkpoint)
        assert path.relative_to(checkpoint).as_posix() in str(caught.value)
        path.write_bytes(original)
    assert bits(state) == before
    assert state.read(checkpoint) == 3
    assert bits(state) != before


def damage(path: Path, how: str, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "flip":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    kept = {"empty": 0, "half": len(data) // 2, "short": len(data) - 1, "flip": len(data)}[how]
    path.write_bytes(data[:kept])


def test_latest_falls_back_to_a_whole_one(
    saved: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = Path(shutil.copytree(saved, checkpoint.with_name("checkpoint-4")))
    os.truncate(newer / "optimizer.safetensors", 100)
    found = find_checkpoint(checkpoint.parent, "latest")
    assert found == checkpoint
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "optimizer.safetensors" in warned[0]


class Poison:
    """Unpickling it would write a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.mkdir, (self.canary,))


@pytest.mark.reliability
def test_resume_executes_no_pickle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    poison = pickle.dumps(Poison(canary))
    for name in ("pytorch_model.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl", "x.pt"):
        (checkpoint / name).write_bytes(poison)
    for model in ("unet", "unet_ema"):
        for name in ("diffusion_pytorch_model.bin", "extra.safetensors"):
            (checkpoint / model / name).write_bytes(poison)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    state = make_state(1)
    found = find_checkpoint(checkpoint.parent, "latest")
    assert found is not None
    assert state.read(found) == 3
    assert not canary.exists()
    monkeypatch.undo()
    pickle.loads(poison)
    assert canary.exists()  # the poison works
