"""What holds for every training script: no run is mixed with another, no variable outranks a flag,
no restored number outlives its flag, nothing is learned from an update that was not made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffusers_curriculum.training.loop import job
from tests.scripts.every_script import (
    SCRIPTS,
    STOPPED,
    Reached,
    Script,
    after_update,
    before_data,
    faults,
)
from tests.training.tiny_state import value_bits


@pytest.fixture(params=SCRIPTS)
def script(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Script:
    torch.set_num_threads(1)
    return Script(request.param, tmp_path, monkeypatch)


# -- one folder, one run ---------------------------------------------------------------------------


@pytest.fixture
def occupied(script: Script) -> Script:
    """Its output folder holds a checkpoint of another run."""
    (script.output / "checkpoint-4").mkdir(parents=True)
    (script.output / "checkpoint-4" / "weights").write_text("another's")
    return script


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_run_is_not_mixed_with_another(occupied: Script) -> None:
    before = files(occupied.output)
    told = occupied.refused()
    for part in ("checkpoint-4", "--resume_from_checkpoint latest", "--overwrite_output_dir"):
        assert part in told
    assert files(occupied.output) == before


def test_a_run_from_elsewhere_is_not_mixed_with_another(occupied: Script) -> None:
    elsewhere = occupied.work / "elsewhere" / "checkpoint-9"
    with mock.patch.object(job, "find_checkpoint", return_value=elsewhere):
        elsewhere.mkdir(parents=True)
        assert "another run" in occupied.refused("--resume_from_checkpoint", elsewhere)


def test_an_old_run_is_moved_aside_where_asked_for(occupied: Script) -> None:
    for number in (1, 2):
        with before_data(), pytest.raises(Reached):
            occupied.main("--overwrite_output_dir")
        aside = occupied.work / f"run.old-{number}"
        assert (aside / "checkpoint-4" / "weights").read_text() == "another's"
        assert files(occupied.output) == []
        (occupied.output / "checkpoint-4").mkdir()
        (occupied.output / "checkpoint-4" / "weights").write_text("another's")


def test_nothing_is_moved_aside_that_the_run_reads(occupied: Script) -> None:
    before = files(occupied.output)
    told = occupied.refused("--overwrite_output_dir", "--resume_from_checkpoint", "latest")
    assert "--resume_from_checkpoint is latest, which lies in --output_dir" in told
    assert files(occupied.output) == before


# -- what is set besides the flags -----------------------------------------------------------------


def test_no_variable_outranks_the_accumulation(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = script.refused("--gradient_accumulation_steps", 1)
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is '4'" in told
    assert "--gradient_accumulation_steps is 1" in told
    with before_data(), pytest.raises(Reached):
        script.main("--gradient_accumulation_steps", 4)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "True"),
        ("ACCELERATE_USE_MEGATRON_LM", "1"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "yes"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
    ],
)
def test_what_is_not_supported_is_refused(
    script: Script, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    told = script.refused()
    assert variable in told
    assert "not supported" in told


@pytest.mark.parametrize("chosen", ["flag", "variable"])
def test_fp16_on_a_cpu_is_refused(
    script: Script, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    more = ("--mixed_precision", "fp16") if chosen == "flag" else ()
    if chosen == "variable":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    told = script.refused(*more)
    assert ("ACCELERATE_MIXED_PRECISION" in told) == (chosen == "variable")
    if script.name == "unconditional" and chosen == "variable":  # its default, as officially
        assert "--mixed_precision is 'no'" in told
    else:
        assert "--mixed_precision bf16 or no" in told


def test_what_is_in_effect_is_recorded(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    more = ("--mixed_precision", "bf16") if script.name == "unconditional" else ()
    with after_update(), pytest.raises(Reached):
        script.main(*more)
    (session,) = json.loads((script.output / "run.json").read_text())["sessions"]
    found = session["in_effect"]
    assert (found["mixed_precision"], found["device"], found["num_processes"]) == ("bf16", "cpu", 1)
    attention = None if script.name in ("vit_vqgan", "own_job") else "sdpa"
    assert found.get("attention") == attention
    wanted = session["arguments"]["gradient_accumulation_steps"]
    assert found["gradient_accumulation_steps"] == wanted


# -- what a checkpoint gives back ------------------------------------------------------------------


def cosine(step: int, warm_up: int, steps: int, rate: float = 1e-3) -> float:
    """diffusers' schedule, in closed form."""
    share = torch.tensor((step - warm_up) / (steps - warm_up), dtype=torch.float64)
    return rate * 0.5 * (1 + float(torch.cos(torch.pi * share)))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("steps", [10, 40])
def test_an_extended_run_has_the_rate_of_its_own_schedule(script: Script, steps: int) -> None:
    script.stopped()
    run = script.resumed("--max_train_steps", steps)
    assert run.used == pytest.approx(cosine(STOPPED, 3, steps), rel=1e-9)
    assert run.lr_scheduler.get_last_lr() == pytest.approx([cosine(STOPPED + 1, 3, steps)])


@pytest.mark.thinned(3)
def test_changed_numbers_hold_after_a_resume(script: Script) -> None:
    script.stopped()
    more = ("--learning_rate", 0.5, "--adam_beta2", 0.5, "--lr_scheduler", "constant")
    if script.name == "vit_vqgan":
        more += ("--discriminator_learning_rate", 0.25)
    run = script.resumed(*more, "--allow_config_change", "optimizer")
    (group,) = run.optimizer.param_groups
    assert (run.used, group["betas"][1], group["initial_lr"]) == (0.5, 0.5, 0.5)
    if script.name == "vit_vqgan":
        (critic,) = run.adversary.optimizer.param_groups
        assert (critic["lr"], critic["betas"][1]) == (0.25, 0.5)


@pytest.mark.thinned(3)
def test_a_rate_that_the_batch_scales_is_scaled_anew(script: Script) -> None:
    script.stopped()
    allowed = ("--allow_config_change", "optimizer", "global_batch")
    more = ("--scale_lr", "--lr_scheduler", "constant", "--train_batch_size", 6)
    run = script.resumed(*more, *allowed)
    accumulation = run.args.gradient_accumulation_steps
    assert run.used == pytest.approx(1e-3 * 6 * accumulation)


# -- what is learned -------------------------------------------------------------------------------


def learned(run: Any) -> Any:
    """The bits of all that follows the losses."""
    if run.network.__class__.__name__ == "ViTVQModel":
        return value_bits(dict(run.averages.network.quantise.named_buffers()))
    learner = run.levels.learned
    state = run.sampler.state_dict()
    kept = {key: state[key] for key in state if key != "calls"}
    return value_bits([kept, {} if learner is None else learner.state_dict()])


def test_nothing_is_learned_from_an_update_that_was_not_made(script: Script) -> None:
    make_update, changed = job.make_update, []

    def noting(run: Any, *args: Any) -> Any:
        before = learned(run)
        result = make_update(run, *args)
        changed.append(learned(run) != before)
        if len(changed) == 4:
            raise Reached
        return result

    with (
        mock.patch.object(job, "make_update", noting),
        faults(lambda number: number in (0, 2)),
        pytest.raises(Reached),
    ):
        script.main("--nonfinite", "skip", "--log_every", 100)
    assert changed == [False, True, False, True]
