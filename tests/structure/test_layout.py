"""The house as built is the house as planned: floors, forbidden calls, sizes."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

import pytest

from tests.structure.layout import (
    PACKAGE,
    ROOMS,
    circles,
    forbidden,
    function_lengths,
    import_findings,
    import_graph,
    parse,
    room,
    training_room,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
SCRIPTS = [
    ROOT / "train_text_to_image_curriculum.py",
    ROOT / "examples/text_to_image/train_text_to_image_flow_curriculum.py",
    ROOT / "examples/text_to_image/train_text_to_image_sdxl_curriculum.py",
    ROOT / "examples/text_to_image/train_text_to_image_lora_curriculum.py",
    ROOT / "examples/text_to_image/train_text_to_image_lora_sdxl_curriculum.py",
    ROOT / "examples/class_conditional/train_class_conditional_curriculum.py",
    ROOT / "examples/unconditional/train_unconditional_curriculum.py",
    ROOT / "examples/autoencoder/train_vit_vqgan.py",
    ROOT / "examples/autoregressive/train_image_tokens_curriculum.py",
]
TREES = parse(FILES, ROOT)
MAY_PRINT = {"cli"}
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
CODE = (PACKAGE, "examples", "benchmarks", "docs", "tests")


def lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 10
    assert {room(name) for name in TREES} >= {"noise_levels", "samplers", "training"}
    assert all(script.is_file() for script in SCRIPTS)


def test_imports_point_downward_only() -> None:
    findings = [f for module, tree in TREES.items() for f in import_findings(tree, module)]
    assert findings == []


def test_there_is_no_import_circle() -> None:
    assert circles(import_graph(TREES)) == []


def test_library_code_holds_nothing_forbidden() -> None:
    findings = [
        finding
        for module, tree in TREES.items()
        for finding in forbidden(tree, module, may_print=room(module) in MAY_PRINT)
    ]
    assert findings == []


def test_scripts_hold_nothing_forbidden() -> None:
    for module, tree in parse(SCRIPTS, ROOT).items():
        assert list(forbidden(tree, module, may_seed=True)) == []


def test_files_are_short() -> None:
    limits = dict.fromkeys(FILES, 300) | dict.fromkeys(SCRIPTS, 150)
    assert {p.name: lines(p) for p, limit in limits.items() if lines(p) > limit} == {}


def test_no_function_is_long() -> None:
    too_long = {
        f"{module}.{name}": length
        for module, tree in TREES.items()
        for name, length in function_lengths(tree).items()
        if length > 60
    }
    assert too_long == {}


def test_a_script_is_its_step() -> None:
    for script in SCRIPTS:
        lengths = function_lengths(ast.parse(script.read_text("utf-8")))
        names = [name.partition(":")[0] for name in lengths]
        parts = [] if script.name == "train_vit_vqgan.py" else ["encode", "predict"]
        assert names == [*parts, "training_step", "main"]
        assert [length <= 15 for name, length in lengths.items() if name.startswith("main:")]
        assert max(lengths.values()) <= 80


def test_the_rooms_of_training_are_those_of_the_plan() -> None:
    found = {training_room(module) for module in TREES} - {None}
    assert found == set(ROOMS)
    assert len(ROOMS) <= 14


def test_the_loop_around_a_step_stands_once() -> None:
    """Nobody else accumulates gradients, clips them or steps a guard's optimizer."""
    found = [
        module
        for module, tree in (TREES | parse(EXAMPLES, ROOT)).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("accumulate", "sync_gradients")
    ]
    assert set(found) == {f"{PACKAGE}.training.loop.run"}


def test_nothing_asks_which_script_runs() -> None:
    """Outside arguments/, no code asks whether a command line has an argument."""
    asked = [
        f"{module}:{node.lineno}"
        for module, tree in (TREES | parse(EXAMPLES, ROOT)).items()
        if training_room(module) != "arguments"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("hasattr", "getattr")
        and ast.unparse(node.args[0]).endswith("args")
    ]
    assert asked == []


def test_only_samplers_know_their_kinds() -> None:
    """Outside samplers/, no code asks which concrete sampler it has: samplers have methods."""
    asked = [
        f"{module}:{node.lineno}"
        for module, tree in (TREES | parse(EXAMPLES, ROOT)).items()
        if room(module) != "samplers"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and re.search(r"\w+TimestepSampler", ast.unparse(node.args[1]))
    ]
    assert asked == []


def test_no_formatting_is_switched_off() -> None:
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    mark = "fmt: " + "skip"
    assert [str(path) for path in files if mark in path.read_text("utf-8")] == []


def test_most_functions_are_tiny() -> None:
    lengths = [n for tree in TREES.values() for n in function_lengths(tree).values()]
    assert statistics.median(lengths) <= 8
    assert statistics.quantiles(lengths, n=10)[-1] <= 22


# -- the checks themselves can fail ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("randomness", "from diffusers_curriculum.pacing import Patience"),
        ("randomness", "from diffusers_curriculum import pacing"),
        ("randomness", "import diffusers_curriculum"),
        ("densities", "def f():\n    import diffusers_curriculum.cli"),
        ("samplers.base", "if True:\n    from diffusers_curriculum.training import hub"),
        ("training.publish.hub", "from diffusers_curriculum.cli import main"),
        ("training.publish.hub", "from . import data"),
        ("training.publish.hub", "from diffusers_curriculum.training.loop.job import Job"),
        ("training.data.plan", "from diffusers_curriculum.training.levels import timesteps"),
        ("training.attic.job", "import torch"),
        ("attic", "import torch"),
        ("samplers.base", "import accelerate"),
        ("objective", "from transformers.models import clip"),
        ("pacing", "import scipy.stats"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(list(import_findings(ast.parse(source), f"{PACKAGE}.{module}"))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("samplers.base", "from diffusers_curriculum.densities import DENSITIES"),
        ("samplers.base", "from diffusers_curriculum.samplers import curriculum"),
        ("training.publish.hub", "import huggingface_hub, json"),
        ("training.tasks.images", "from diffusers_curriculum.training.loop.job import Job"),
        ("training.loop.job", "from diffusers_curriculum.training.loop.run import Run"),
        ("objective", "import diffusers.utils, numpy as np, torch"),
    ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
    assert list(import_findings(ast.parse(source), f"{PACKAGE}.{module}")) == []


def test_a_circle_is_found() -> None:
    sources = {
        "p.a": "from p.b import x",
        "p.b": "def f():\n    from p import c",
        "p.c": "import p.a",
        "p.d": "import p.a, p.b",
    }
    graph = import_graph({name: ast.parse(source) for name, source in sources.items()})
    assert circles(graph) == [["p.a", "p.b", "p.c", "p.a"]]


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "from torch import load",
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "exec(text)",
        "assert x",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "print(1)",
        "try:\n    pass\nexcept:\n    pass",
        "torch.randn(3)",
        "torch.randint(0, 5, (3,), device=d)",
        "torch.manual_seed(0)",
        "np.random.rand(3)",
        "numpy.random.seed(0)",
        "import random",
        "from random import shuffle",
        "with torch.random.fork_rng():\n    pass\ntorch.manual_seed(0)",
    ],
)
def test_a_forbidden_call_is_found(source: str) -> None:
    assert len(list(forbidden(ast.parse(source), "m"))) == 1


def test_a_script_may_seed_but_not_draw() -> None:
    source = "torch.manual_seed(0)\ntorch.randn(3)"
    assert len(list(forbidden(ast.parse(source), "m"))) == 2
    (finding,) = forbidden(ast.parse(source), "m", may_seed=True)
    assert finding.startswith("m:2 torch.randn()")


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.randn(3, generator=g)",
        "np.random.Generator(np.random.Philox(key=1)).random(3)",
        "with torch.random.fork_rng():\n    torch.manual_seed(0)",
        "f(trust_remote_code=False)",
        "safetensors.torch.load(data)",
        "re.compile(pattern)",
    ],
)
def test_an_allowed_call_is_not(source: str) -> None:
    assert list(forbidden(ast.parse(source), "m")) == []


def test_lengths_are_counted_from_def_to_the_last_line() -> None:
    source = 'def f():\n    """Doc."""\n    def g():\n        return 1\n\n    return g\n'
    assert function_lengths(ast.parse(source)) == {"f:1": 6, "g:3": 2}
