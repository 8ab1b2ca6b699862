"""Official training scripts, changed as docs/drop-in.md says, make two steps on tiny models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.drop_in.runs import BATCH, RECIPES, STEPS, run

SOURCE = os.environ.get("DIFFUSERS_SOURCE", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE, reason="DIFFUSERS_SOURCE names no checkout of diffusers"),
]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_two_steps_train_on_the_timesteps_that_were_drawn_here(name: str, tmp_path: Path) -> None:
    outcome = run(name, Path(SOURCE), tmp_path)
    assert outcome.status == 0, outcome.output[-3000:]
    assert [len(batch) for batch in outcome.drawn] == [BATCH] * STEPS
    recipe, seen = RECIPES[name], torch.tensor(outcome.seen)
    drawn = torch.tensor(outcome.drawn).repeat(1, recipe.copies)
    torch.testing.assert_close(recipe.origin + recipe.scale * seen, drawn)
    weights = load_file(outcome.weights)
    assert weights
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
