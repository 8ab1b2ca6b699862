"""A recipe in the scripts: recorded with everything that it put, and resumed as its flags are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.small_runs import BENCHES, Bench, status, train


@pytest.fixture(scope="module", params=sorted(BENCHES))
def any_bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return BENCHES[request.param](tmp_path_factory.mktemp(request.param))


def test_the_record_of_a_run_tells_the_recipe_and_what_it_put(
    any_bench: Bench, tmp_path: Path
) -> None:
    more = ("--recipe", "min-snr", "--max_train_steps", 1, "--checkpointing_steps", 1)
    train(any_bench.argv(tmp_path, *more), script=any_bench.script)
    record = json.loads((tmp_path / "run.json").read_text("utf-8"))
    (session,) = record["sessions"]
    told: dict[str, Any] = session["arguments"]
    assert (told["recipe"], told["loss_weighting"]) == ("min-snr", "min_snr")
    assert told["loss_weighting_args"] == "gamma=5.0"
    assert record["facts"]["loss_weighting"] == {"name": "min_snr", "gamma": 5.0}
    typed = ("--loss_weighting", "min_snr", "--loss_weighting_args", "gamma=5.0")
    again = (*typed, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert status(any_bench.argv(tmp_path, *again), any_bench.script) == 0


def test_a_recipe_for_other_models_ends_a_run_before_it_begins(
    bench: Bench, tmp_path: Path
) -> None:
    assert status(bench.argv(tmp_path / "out", "--recipe", "edm2"), bench.script) == 2
    assert not (tmp_path / "out").exists()
