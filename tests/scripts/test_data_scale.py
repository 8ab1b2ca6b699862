"""Every script that adds noise measures the scale of its data once, and a resumed run keeps the
number."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusers_curriculum.training.levels import data_scale
from tests.scripts.small_runs import BENCHES, RESOLUTION, Bench, train

AUTO = ("--timestep_sampler", "laplace", "--data_scale", "auto")


@pytest.fixture(scope="module", params=sorted(BENCHES.keys() - {"image_tokens"}))
def any_bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return BENCHES[request.param](tmp_path_factory.mktemp(request.param))


def scale_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text("utf-8"))["facts"]["data_scale"]


def steps(run: Any) -> list[Any]:
    return [(step.indices, step.loss) for step in run.steps]


@pytest.mark.thinned(3)
def test_measured_once_and_resumed_bit_for_bit(
    any_bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(
        any_bench.argv(tmp_path / "a", *AUTO, "--max_train_steps", 4), script=any_bench.script
    )
    more = (*AUTO, "--checkpointing_steps", 2)
    first = train(
        any_bench.argv(tmp_path / "b", *more, "--max_train_steps", 2), script=any_bench.script
    )
    measured = scale_of(tmp_path / "b")
    assert measured == scale_of(tmp_path / "a")
    assert measured["std"] > 0.05
    manifest = json.loads((tmp_path / "b/checkpoint-2/manifest.json").read_text("utf-8"))
    assert manifest["facts"]["data_scale"] == measured
    sampler = manifest["facts"]["sampler"]
    assert (sampler["density"], sampler["density_args"]["shift"]) == ("shifted", measured["std"])

    def again(batches: Any) -> Any:
        raise AssertionError("a resumed run measures again")

    monkeypatch.setattr(data_scale, "measure", again)
    resumed = (*more, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    second = train(any_bench.argv(tmp_path / "b", *resumed), script=any_bench.script)
    assert steps(first) + steps(second) == steps(straight)
    assert scale_of(tmp_path / "b") == measured


def test_by_default_it_is_told_and_moves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The pixels of all images, cut as the script cuts them, by PIL and numpy."""
    any_bench = BENCHES["unconditional"](tmp_path / "bench")
    more = ("--max_train_steps", 1, "--timestep_sampler", "laplace", "--center_crop")
    with caplog.at_level(logging.INFO):
        run = train(any_bench.argv(tmp_path / "run", *more), script=any_bench.script)
    found = scale_of(tmp_path / "run")
    assert run.last.levels.data_std == found["std"]
    paths = sorted(any_bench.images.glob("*.png"))
    images = [
        Image.open(path).convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR)
        for path in paths
    ]
    values = np.stack([np.asarray(image, dtype=float) / 127.5 - 1 for image in images])
    assert found["samples"] == len(paths)
    assert found["std"] == pytest.approx(values.std(), rel=2e-3)
    assert found["mean"] == pytest.approx(values.mean(), abs=2e-3)
    assert f"for data of standard deviation {found['std']:.4g}: quartiles" in caplog.text
    facts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["facts"]
    assert facts["sampler"]["density"] == "laplace"
