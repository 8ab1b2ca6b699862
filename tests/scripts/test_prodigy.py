"""Prodigy: diffusers' settings, the scale that it finds, and a resume that keeps it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.checkpoint.optimizer import (
    load_optimizer_state,
    optimizer_state,
    own_numbers,
)
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.optimizers import build_optimizer, check_rates
from tests.scripts.small_runs import Bench, adapted, hashes, status
from tests.training.command_lines import parse_args

PRODIGY = ("--optimizer", "prodigy", "--learning_rate", 1)
RUN = (*PRODIGY, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--max_train_steps", 6)


def arguments(tmp_path: Path, *more: object) -> Any:
    (tmp_path / "a.png").touch()
    argv = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path)]
    return parse_args([*argv, "--output_dir", str(tmp_path / "out"), *map(str, more)])


def test_a_resumed_run_keeps_the_scale_that_was_found(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    lora = adapted(bench)
    whole = lora.train(tmp_path / "whole", *RUN, "--checkpointing_steps", 3)
    name = "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "parts" / name)
    resumed = ("--resume_from_checkpoint", "latest")
    rest = lora.train(tmp_path / "parts", *RUN, "--checkpointing_steps", 3, *resumed)
    assert rest.steps == whole.steps[3:]
    groups = [record.last.optimizer.param_groups[0] for record in (whole, rest)]
    found = ("k", "d", "d_max", "d_hat", "d_numerator", "d_denom")
    assert [groups[0][name] for name in found] == [groups[1][name] for name in found]
    assert groups[0]["d_numerator"] != 0
    last = [hashes(tmp_path / folder / "checkpoint-6") for folder in ("whole", "parts")]
    assert last[0] == last[1]
    # moments of another optimizer are of no use
    other = lora.argv(tmp_path / "whole", "--max_train_steps", 8, *resumed)
    assert status(other, lora.script) != 0


def test_the_scale_goes_on_growing_from_a_saved_state(tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    args, start = arguments(tmp_path, *PRODIGY), torch.linspace(1, 2, 8)

    def descend(optimizer: Any, weights: torch.nn.Parameter, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            weights.square().sum().backward()
            optimizer.step()

    whole = torch.nn.Parameter(start.clone())
    first = build_optimizer(args, [whole], 1)
    descend(first, whole, 20)
    tensors, described = optimizer_state(first)
    tensors = {name: each.clone() for name, each in tensors.items()}
    rest = torch.nn.Parameter(whole.detach().clone())
    second = build_optimizer(args, [rest], 1)
    put_back = own_numbers(second)
    load_optimizer_state(second, tensors, described)
    put_back()
    assert second.param_groups[0]["d"] == first.param_groups[0]["d"] > 1.5e-6
    descend(first, whole, 20)
    descend(second, rest, 20)
    assert torch.equal(whole, rest)
    assert second.param_groups[0]["d"] == first.param_groups[0]["d"]


def test_the_settings_are_those_of_the_flags(tmp_path: Path) -> None:
    kind = pytest.importorskip("prodigyopt").Prodigy
    more = ("--adam_beta1", 0.5, "--adam_beta2", 0.25, "--prodigy_beta3", 0.75)
    more += ("--prodigy_decouple", "false", "--adam_weight_decay", 0.125)
    args = arguments(tmp_path, *PRODIGY, *more)
    optimizer = build_optimizer(args, [torch.nn.Parameter(torch.ones(2))], 1)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    expected = {"lr": 1.0, "betas": (0.5, 0.25), "beta3": 0.75, "weight_decay": 0.125}
    expected |= {"decouple": False, "use_bias_correction": True, "safeguard_warmup": True}
    assert {name: group[name] for name in expected} == expected


def test_zeros_are_refused_and_a_small_rate_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("prodigyopt")
    check_rates(arguments(tmp_path, *PRODIGY), 1, 10)
    assert not caplog.text
    check_rates(arguments(tmp_path, "--optimizer", "Prodigy"), 1, 10)
    assert "multiplies a rate that it finds by itself: 1 is usual" in caplog.text
    for name in ("learning_rate", "adam_epsilon"):
        with pytest.raises(UsageError, match=f"--{name} is 0, which --optimizer prodigy refuses"):
            check_rates(arguments(tmp_path, *PRODIGY, f"--{name}", 0), 1, 10)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--optimizer", "sgd"), "--optimizer is 'sgd': choose from AdamW, prodigy, "),
        (("--prodigy_beta3", 0.5), "no effect without --optimizer prodigy"),
        (("--optimizer", "prodigy", "--use_8bit_adam"), "no effect without --optimizer AdamW"),
    ],
)
def test_what_another_optimizer_needs_is_refused(
    tmp_path: Path, more: tuple[object, ...], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        arguments(tmp_path, *more)


def test_facts_tell_of_an_optimizer_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    plain = arguments(tmp_path).of_setting("optimizer")
    assert not [name for name in plain if name.startswith(("prodigy_", "optimizer"))]
    told = arguments(tmp_path, *PRODIGY, "--prodigy_decouple", "no").of_setting("optimizer")
    assert (told["optimizer"], told["prodigy_decouple"]) == ("prodigy", False)
