"""What answers without training starts as fast as Python does: it loads none of the libraries."""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from diffusers import DDPMScheduler

import diffusers_curriculum
from diffusers_curriculum import pipelines
from diffusers_curriculum.cli import build_parser

ROOT = Path(__file__).parents[2]
HEAVY = (
    "accelerate",
    "datasets",
    "diffusers",
    "matplotlib",
    "numpy",
    "PIL",
    "safetensors",
    "scipy",
    "torch",
    "torchmetrics",
    "tqdm",
    "transformers",
)
COMMANDS = ("train", "make-tiny", "verify", "preview", "analyze", "calibrate", "compare")
COMMANDS += ("reconstruct-ema", "demo")
ARGUMENTS = "diffusers_curriculum.training.arguments"
PARSERS = ("run", "noise_levels", "curriculum", "images", "evaluation", "command_line")
SCRIPTS = (
    "train_text_to_image_curriculum.py",
    "examples/text_to_image/train_text_to_image_flow_curriculum.py",
    "examples/text_to_image/train_text_to_image_sdxl_curriculum.py",
    "examples/text_to_image/train_text_to_image_lora_curriculum.py",
    "examples/text_to_image/train_text_to_image_lora_sdxl_curriculum.py",
    "examples/class_conditional/train_class_conditional_curriculum.py",
    "examples/unconditional/train_unconditional_curriculum.py",
    "examples/autoencoder/train_vit_vqgan.py",
    "examples/autoregressive/train_image_tokens_curriculum.py",
)
BARE = ("-c", "import argparse, importlib.metadata")
LIBRARIES = ("-c", "import torch, diffusers, accelerate")


def loaded(program: str) -> tuple[list[str], str]:
    """(libraries that were loaded when a program ended, what it wrote), run in a process."""
    code = f"""if True:
        import atexit, json, sys
        atexit.register(lambda: print("loaded", json.dumps(
            [name for name in {HEAVY!r} if name in sys.modules])))
        {program}
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    told, _, names = done.stdout.rpartition("loaded ")
    return json.loads(names), told


def cli(*argv: str) -> tuple[list[str], str]:
    return loaded(f"from diffusers_curriculum.cli import main; sys.exit(main({list(argv)!r}))")


def seconds(argv: Sequence[str]) -> float:
    """How long a process takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *argv], check=True, capture_output=True, cwd=ROOT, timeout=120)
    return time.perf_counter() - started


# -- what is loaded --------------------------------------------------------------------------------


def test_the_check_itself_sees_what_is_loaded() -> None:
    names, told = loaded("import numpy, safetensors; print('all well')")
    assert (names, told) == (["numpy", "safetensors"], "all well\n")


@pytest.mark.parametrize("argv", [(), *((command,) for command in COMMANDS)], ids=str)
def test_help_loads_no_library(argv: Sequence[str]) -> None:
    names, told = cli(*argv, "--help")
    assert names == []
    assert told.startswith("usage: diffusers-curriculum")


def test_every_command_is_among_them() -> None:
    actions = build_parser()._actions
    (commands,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) == set(COMMANDS)


def test_the_version_loads_no_library() -> None:
    version = diffusers_curriculum.__version__
    assert cli("--version") == ([], f"diffusers-curriculum {version}\n")


@pytest.mark.parametrize("more", [(), ("--compare", "uniform", "laplace")], ids=str)
def test_a_preview_in_text_draws_with_no_plotting_library(tmp_path: Path, more: tuple) -> None:
    DDPMScheduler().save_pretrained(tmp_path)
    names, told = cli("preview", str(tmp_path), "--max_train_steps", "100", *more)
    assert not {"matplotlib", "transformers", "datasets", "accelerate"} & set(names)
    assert "log-SNR" in told


@pytest.mark.parametrize("module", PARSERS)
def test_parsers_of_training_load_no_library(module: str) -> None:
    assert loaded(f"import {ARGUMENTS}.{module}") == ([], "")


# -- names that are imported when asked for --------------------------------------------------------


@pytest.mark.parametrize("package", [diffusers_curriculum, pipelines])
def test_every_name_is_there_and_the_one_that_type_checkers_see(package: object) -> None:
    source = Path(str(vars(package)["__file__"])).read_text("utf-8")
    seen = {
        alias.name: f"{node.module}"
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = vars(package)["__all__"]
    assert set(names) == set(seen)
    for name in names:
        value = getattr(package, name)
        assert value is getattr(sys.modules[seen[name]], name)


def test_unknown_names_are_attribute_errors() -> None:
    for package in (diffusers_curriculum, pipelines):
        with pytest.raises(AttributeError, match="has no attribute 'Sampler'"):
            _ = package.Sampler


def test_names_show_before_they_are_imported() -> None:
    program = "import diffusers_curriculum as package; print(sorted(dir(package)))"
    names, told = loaded(program)
    assert names == []
    assert set(diffusers_curriculum.__all__) <= set(ast.literal_eval(told))


# -- how long it takes -----------------------------------------------------------------------------


def test_the_command_line_starts_about_as_fast_as_python() -> None:
    # The bar is several times what it takes: torch alone takes longer.
    command = ("-m", "diffusers_curriculum.cli", "--help")
    pairs = [(seconds(BARE), seconds(command)) for _ in range(3)]
    bare, took = (min(times) for times in zip(*pairs, strict=True))
    assert took < 3 * bare + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_show_their_help_about_as_fast_as_their_libraries_load(script: str) -> None:
    pairs = [(seconds(LIBRARIES), seconds((script, "--help"))) for _ in range(3)]
    libraries, took = (min(times) for times in zip(*pairs, strict=True))
    assert took < libraries + 1
