"""transformers' lines about torchvision reach nobody who runs a script or a command."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = (
    "train_text_to_image_curriculum.py",
    "examples/text_to_image/train_text_to_image_flow_curriculum.py",
    "examples/text_to_image/train_text_to_image_sdxl_curriculum.py",
    "examples/class_conditional/train_class_conditional_curriculum.py",
    "examples/unconditional/train_unconditional_curriculum.py",
    "examples/autoencoder/train_vit_vqgan.py",
    "examples/autoregressive/train_image_tokens_curriculum.py",
    "examples/text_to_image/recognise.py",
    "examples/text_to_image/learning_curve.py",
    "examples/class_conditional/recognise_classes.py",
    "diffusers_curriculum/cli/__main__.py",
)
# Runs a program, and at its end what makes transformers write the lines, as pipelines do.
PROVOKED = """
import atexit, os, runpy, sys
atexit.register(lambda: __import__("transformers").CLIPImageProcessor)
sys.argv = sys.argv[1:]
if sys.argv:
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def told(*argv: str) -> str:
    command = [sys.executable, "-c", PROVOKED, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_the_lines_are_provoked() -> None:
    pytest.importorskip("transformers", minversion="5")  # which writes them
    assert "requires torchvision (not installed)" in told()


@pytest.mark.reliability
@pytest.mark.thinned(3)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_lines_are_not_shown(program: str) -> None:
    text = told(program, "--help")
    assert "usage: " in text
    assert "torchvision (not installed)" not in text
