"""The recipes: short, and every one runs, in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.pacing import PACINGS

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
NOTEBOOK = RECIPES / "preview.ipynb"
MOST = 40
JOB = "own_job.py"


def run(*arguments: str, folder: Path) -> str:
    """What ``python arguments`` writes, offline and with one thread; it must succeed."""
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet |= {"MPLBACKEND": "agg", "PYTHONPATH": f"{ROOT}{os.pathsep}{RECIPES}"}
    command = [sys.executable, *arguments]
    environment = os.environ | quiet
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def falls(losses: list[float]) -> bool:
    """Whether the last eighth of the losses is at most four fifths of the first."""
    eighth = len(losses) // 8
    return sum(losses[-eighth:]) <= 0.8 * sum(losses[:eighth])


def cells(notebook: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [c for c in json.loads(notebook.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


# -- sizes -----------------------------------------------------------------------------------------


def test_every_recipe_is_looked_at() -> None:
    found = {path.name for path in RECIPES.iterdir() if path.is_file()}
    scripts = {
        "own_loop.py",
        "own_density.py",
        "own_pacing.py",
        "with_peft.py",
        "rank_by_noise.py",
        "levels_per_frame.py",
        JOB,
    }
    assert found == scripts | {NOTEBOOK.name}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda p: p.name)
def test_a_recipe_has_at_most_forty_lines(recipe: Path) -> None:
    most = 100 if recipe.name == JOB else MOST  # a whole kind of training
    assert 10 < len(recipe.read_text("utf-8").splitlines()) <= most


def test_the_notebook_is_short_and_clean() -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"code", "markdown"}
    code = cells(NOTEBOOK)
    assert len(code) >= 3
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
    assert sum(len(cell["source"]) for cell in code) <= MOST


# -- they run --------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_learns(tmp_path: Path) -> None:
    program = "import json, own_loop; print(json.dumps(own_loop.train(steps=64, batch=16)))"
    losses = json.loads(run("-c", program, folder=tmp_path))
    assert len(losses) == 64
    assert falls(losses), losses


def test_levels_per_frame_are_learned(tmp_path: Path) -> None:
    train = "levels_per_frame.train(steps=96, batch=16)"
    program = f"import json, levels_per_frame; print(json.dumps({train}))"
    losses = json.loads(run("-c", program, folder=tmp_path))
    assert len(losses) == 96
    assert falls(losses), losses


def test_lora_by_peft_learns(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    program = (
        "import json, torch, with_peft; torch.manual_seed(0); "
        "print(json.dumps(with_peft.train(steps=64, batch=16)))"
    )
    losses = json.loads(run("-c", program, folder=tmp_path))
    assert len(losses) == 64
    assert falls(losses), losses


def test_the_rank_falls_with_the_noise(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    program = (
        "import json, torch, rank_by_noise as recipe, with_peft; torch.manual_seed(0)\n"
        "seen, kept = [], []\n"
        "def prepare(model):\n"
        "    seen.append(model); kept.append(recipe.RankByNoise(model)); return kept[0]\n"
        "losses = with_peft.train(steps=64, batch=16, prepare=prepare)\n"
        "(model,), (rank,), used = seen, kept, {}\n"
        "for t in (999, 500, 0):\n"
        "    at = torch.full((2,), t); rank(at); model.zero_grad()\n"
        "    model(torch.ones(2, 1, 8, 8), at, torch.tensor([1, 2]))[0].square().sum().backward()\n"
        "    for name, p in model.named_parameters():\n"
        "        if 'lora_A' in name:\n"
        "            rows = p.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()\n"
        "            used.setdefault(t, []).append(rows)\n"
        "print(json.dumps([losses, used]))"
    )
    losses, used = json.loads(run("-c", program, folder=tmp_path))
    assert falls(losses), losses
    wanted = {"999": 1, "500": 4, "0": 8}  # 1 + 7 (1 - t / 999), rounded to even
    for timestep, count in wanted.items():
        assert len(used[timestep]) > 6
        assert all(rows == list(range(count)) for rows in used[timestep])


def test_losses_that_do_not_fall_are_seen() -> None:
    assert not falls([1.0] * 64)
    assert not falls([1.0, 0.9] * 32)
    assert falls([1.0] * 32 + [0.7] * 32)


def test_a_density_of_ones_own_is_drawn(tmp_path: Path) -> None:
    told = run(str(RECIPES / "own_density.py"), folder=tmp_path)
    low, high, mean = map(float, re.findall(r"-?\d+\.\d+", told))
    # a triangle from -3 to 5 about 1, its mean good to 4 / sqrt(6 * 100,000)
    assert -3.1 < low < -2.7
    assert 4.7 < high < 5.1
    assert mean == pytest.approx(1, abs=0.03)


def test_a_density_of_ones_own_is_what_it_says(tmp_path: Path) -> None:
    program = (
        "import json, torch, own_density\n"
        "from diffusers_curriculum.densities import make_density\n"
        "law = make_density('triangle', torch.zeros(2), mu=1.0, w=2.0)\n"
        "x = torch.linspace(-1.5, 3.5, 11, dtype=torch.float64)\n"
        "print(json.dumps([law.pdf(x).tolist(), law.cdf(x).tolist()]))"
    )
    pdf, cdf = json.loads(run("-c", program, folder=tmp_path))
    law: Any = stats.triang(0.5, loc=-1, scale=4)
    x = [-1.5 + i / 2 for i in range(11)]
    assert pdf == pytest.approx(law.pdf(x).tolist(), abs=1e-12)
    assert cdf == pytest.approx(law.cdf(x).tolist(), abs=1e-12)


def test_a_pacing_of_ones_own_opens_the_clusters(tmp_path: Path) -> None:
    told = run(str(RECIPES / "own_pacing.py"), folder=tmp_path)
    # a cluster every 10 steps up to the fourth, then every 5
    assert ast.literal_eval(told) == [1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 6, 6]


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    parts = ["".join(cell["source"]) for cell in cells(NOTEBOOK)]
    script = tmp_path / "cells.py"
    # what a notebook would show of a cell, its last expression, is kept in a list
    tell = "for image in shown:\n    print('picture', *image.size, len(image.getcolors(10**7)))\n"
    script.write_text("\n\n".join(["shown = []", *map(_keeping, parts), tell]), "utf-8")
    told = run(str(script), folder=tmp_path)
    assert told.startswith("laplace(mu=0.0, b=0.5), floor=0.1; 10 clusters")
    for text in ("density over log-SNR", "share of each cluster", "quantiles", "speed"):
        assert text in told
    pictures = re.findall(r"^picture (\d+) (\d+) (\d+)$", told, re.MULTILINE)
    assert len(pictures) == 2
    assert all(int(w) > 500 and int(h) > 300 and int(c) > 50 for w, h, c in pictures)


def _keeping(cell: str) -> str:
    last = ast.parse(cell).body[-1]
    if not isinstance(last, ast.Expr) or ast.unparse(last).startswith("print("):
        return cell
    lines = cell.splitlines()
    expression = "\n".join(lines[last.lineno - 1 :])
    return "\n".join([*lines[: last.lineno - 1], f"shown.append({expression})"])


def test_nothing_of_the_recipes_is_registered_here() -> None:
    assert "triangle" not in DENSITIES
    assert "slow_then_fast" not in PACINGS
