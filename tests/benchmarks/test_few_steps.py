"""What is told of one step and two: the committed figures, and what they are made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks import few_steps
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional

RESULTS = few_steps.ROOT / "benchmarks" / "results"
README = few_steps.EXAMPLES / "README.md"


def test_the_mean_of_a_class_has_no_spread() -> None:
    scans, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    means = np.stack([scans[labels == label].mean(0) for label in labels])
    assert few_steps.spread(means, labels) < 1e-9
    half = means + (scans - means) / 2
    assert np.isclose(few_steps.spread(half, labels), few_steps.spread(scans, labels) / 2)


def test_each_kind_is_a_command_of_the_script(tmp_path: Path) -> None:
    for flags in few_steps.kinds(400).values():
        line = ["--model_config", "DiT-S/2", "--train_data_dir", str(tmp_path), *flags]
        ClassConditional().parse(line, machine=False)


@pytest.mark.parametrize(("name", "seeds"), [("few_steps", 5), ("few_steps_longer", 3)])
def test_the_documents_tell_what_was_measured(name: str, seeds: int) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    assert few_steps.table(found) in README.read_text("utf-8")
    for by_kind in (found["recognised"], found["spread"]):
        assert {len(v) for by_steps in by_kind.values() for v in by_steps.values()} == {seeds}
