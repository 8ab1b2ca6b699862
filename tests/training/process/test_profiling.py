"""A trace holds the steps that were asked for, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process.profiling import TABLE, TRACE, WARM_UP, profiled
from tests.scripts.every_script import Script


def test_the_steps_after_the_warm_up_are_traced(tmp_path: Path) -> None:
    sides = range(1, WARM_UP + 6)
    with profiled(2, len(sides), tmp_path) as stepped:
        for side in sides:
            torch.zeros(side).cumsum(0)
            stepped()
    events = json.loads((tmp_path / TRACE).read_text("utf-8"))["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{WARM_UP}", f"ProfilerStep#{WARM_UP + 1}"}
    assert sum(event["name"] == "aten::cumsum" for event in events) == 2
    assert "aten::cumsum" in (tmp_path / TABLE).read_text("utf-8")


def test_a_run_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="--profile_steps is 3, and this run makes 12: 10 are left"),
        profiled(3, WARM_UP + 2, tmp_path),
    ):
        pass


def test_nothing_is_traced_unless_it_is_asked_for(tmp_path: Path) -> None:
    with profiled(None, 1, tmp_path / "none") as stepped:
        stepped()
    assert not (tmp_path / "none").exists()


def test_a_run_traces_its_steps_and_refuses_too_few_before_any_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script("own_job", tmp_path, monkeypatch)
    with pytest.raises(UsageError, match="this run makes 10: 10 are left out before"):
        script.main("--profile_steps", 1)
    assert not list(script.output.glob("checkpoint-*"))
    script.main("--profile_steps", 1, "--max_train_steps", 11)
    assert (script.output / "profile" / TRACE).is_file()
