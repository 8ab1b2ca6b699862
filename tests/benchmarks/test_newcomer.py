"""The newcomer's way: whether it is the tutorial's, and whether what went wrong would be seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import newcomer
from tests.training.fake_hub import FakeHub, serve

COMMANDS = list(newcomer.commands(Path("dc.whl")))


def test_the_commands_are_the_tutorials() -> None:
    install, train, push, draw = COMMANDS
    assert install == ["pip", "install", "dc.whl[train]", "scikit-learn"]
    assert train[:2] == ["diffusers-curriculum", "demo"]
    assert push[:2] == ["hf", "upload"]
    compile(draw[2], "tutorial", "exec")


def test_the_push_sends_the_pipeline_and_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "sd-digits"
    names = ("README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors")
    for name in (*names, "checkpoint-100/unet/diffusion_pytorch_model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    with serve() as hub:
        newcomer.timed(COMMANDS[2], tmp_path, Path(sys.executable).parent, hub, "")
    assert hub.files == {name: name.encode() for name in names}


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    pictures = ("demo/pictures/digits_after.png", "demo/pictures/learning_curve.png", "three.png")
    for name in pictures:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 50).save(tmp_path / name)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "three.png")
    hub = FakeHub(files={"model_index.json": b"", "README.md": b""})
    missing = "unet/diffusion_pytorch_model.safetensors is not on the Hub"
    assert newcomer.faults(tmp_path, hub) == ["three.png is blank", missing]


def test_a_command_that_fails_tells_why(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise SystemExit('no such digit')"]
    with pytest.raises(RuntimeError, match="no such digit"):
        newcomer.timed(words, tmp_path, tmp_path, FakeHub(), "")


@pytest.mark.slow
@pytest.mark.hub
@pytest.mark.timeout(900)
def test_the_way_takes_less_than_eight_minutes(tmp_path: Path) -> None:
    assert newcomer.main(["--check", "--json", str(tmp_path / "found.json")]) == 0
    assert len(json.loads((tmp_path / "found.json").read_text())["seconds"]) == 4
