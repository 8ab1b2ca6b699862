"""What the network predicts reaches the loss, the saved scheduler and the pictures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)

from tests.scripts.pipelines import SD, draws_a_picture, with_scheduler
from tests.scripts.small_runs import Bench, finite, status, train


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_reaches_the_saved_scheduler(
    bench: Bench, tmp_path: Path, kind: str
) -> None:
    more = ("--prediction_type", kind, "--validation_prompts", "a")
    record = train(bench.argv(tmp_path, *more, "--max_train_steps", 2))
    assert finite(record)
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == kind
    assert draws_a_picture(tmp_path)


def test_prediction_types_have_different_losses(bench: Bench, tmp_path: Path) -> None:
    first = {
        kind: train(bench.argv(tmp_path / kind, "--max_train_steps", 1, "--pred", kind)).losses[0]
        for kind in ("epsilon", "v_prediction", "sample")
    }
    assert len(set(first.values())) == 3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_finite_at_zero_terminal_snr(bench: Bench, tmp_path: Path, kind: str) -> None:
    scheduler = DDPMScheduler(**SD, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    rescaled = with_scheduler(bench, tmp_path / "pipeline", scheduler)
    # Boundaries leave the noisiest level alone, and the curriculum begins with it.
    more = ("--curriculum", "difficulty", "--curriculum_clustering", "explicit")
    more += ("--curriculum_boundaries", 0, 999, "--curriculum_max_share", 1e6)
    more += ("--snr_gamma", 5, "--prediction_type", kind, "--max_train_steps", 2)
    more += ("--untrained_timestep", 999) if kind == "epsilon" else ()
    record = train(rescaled.argv(tmp_path / "out", *more))
    assert {level for step in record.steps for level in step.indices} == {999}
    weights = record.last.levels.weights
    assert bool(weights.isfinite().all())
    losses = [float.fromhex(loss) for loss in record.losses]
    assert all(map(math.isfinite, losses))
    assert all(loss > 0 for loss in losses) == (float(weights[999]) > 0) == (kind == "epsilon")


def test_a_weight_of_zero_at_terminal_snr_is_told(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = DDPMScheduler(**SD, rescale_betas_zero_snr=True)
    rescaled = with_scheduler(bench, tmp_path / "pipeline", scheduler)
    more = ("--loss_weighting", "p2", "--prediction_type", "v_prediction")
    train(rescaled.argv(tmp_path / "out", *more, "--max_train_steps", 1))
    assert "never trained" in caplog.text


def test_a_flow_matching_pipeline_trains(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = with_scheduler(bench, tmp_path / "pipeline", FlowMatchEulerDiscreteScheduler(shift=3.0))
    conditions: list[torch.Tensor] = []
    forward = UNet2DConditionModel.forward

    def watched(self: Any, sample: Any, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        conditions.append(timestep)
        return forward(self, sample, timestep, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    more = ("--timestep_sampler", "normal", "--timestep_sampler_args", "mean=0", "std=2")
    record = train(flow.argv(tmp_path / "out", *more, "--max_train_steps", 3))
    assert finite(record)
    assert len(conditions) == 3
    assert all(t.is_floating_point() for t in conditions)
    assert bool((torch.cat(conditions).frac() != 0).any())
    assert record.last.objective.prediction_type == "flow"
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"


def test_the_pipelines_own_scheduler_is_kept(bench: Bench, tmp_path: Path) -> None:
    own = with_scheduler(bench, tmp_path / "pipeline", PNDMScheduler(**SD, skip_prk_steps=True))
    more = ("--prediction_type", "v_prediction", "--validation_prompts", "a")
    record = train(own.argv(tmp_path / "out", *more, "--max_train_steps", 1))
    assert type(record.last.levels.scheduler) is DDPMScheduler
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "PNDMScheduler"
    assert config["prediction_type"] == "v_prediction"


def test_a_flow_prediction_is_saved_under_diffusers_name(bench: Bench, tmp_path: Path) -> None:
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    flow = with_scheduler(bench, tmp_path / "pipeline", solver)
    more = ("--validation_prompts", "a", "--validation_steps", 1, "--max_train_steps", 2)
    record = train(flow.argv(tmp_path / "out", *more))
    assert record.last.objective.prediction_type == "flow"
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "flow_prediction"
    assert draws_a_picture(tmp_path / "out")


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "flow_prediction"),
        (PNDMScheduler(**SD, skip_prk_steps=True), "sample"),
    ],
    ids=["flow", "pndm"],
)
def test_a_scheduler_that_cannot_draw_is_told_before_training(
    bench: Bench,
    tmp_path: Path,
    scheduler: Any,
    kind: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = type(scheduler).__name__
    other = with_scheduler(bench, tmp_path / "pipeline", scheduler)
    more = ("--max_train_steps", 1, "--prediction_type", kind)
    assert status(other.argv(tmp_path / "a", *more, "--validation_prompts", "a")) == 2
    assert re.search(f"error: {name}.* cannot draw .*--validation_prompts", capsys.readouterr().err)
    assert status(other.argv(tmp_path / "b", *more)) == 0  # training itself is no problem
    assert "will need another one" in caplog.text
