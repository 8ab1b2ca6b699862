"""The optimizer, and rates that depend on steps alone."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.parts.optimizers import build_lr_scheduler, build_optimizer
from tests.training.command_lines import parse_args


def arguments(tmp_path: Any, *more: object) -> Any:
    (tmp_path / "a.png").touch()
    argv = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path)]
    return parse_args([*argv, "--output_dir", str(tmp_path / "out"), *map(str, more)])


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]


def rates(args: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(weights(), lr=args.learning_rate)
    scheduler = build_lr_scheduler(args, optimizer, steps)
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


def test_adamw_takes_the_official_flags(tmp_path: Any) -> None:
    more = ("--learning_rate", 0.3, "--adam_beta1", 0.1, "--adam_beta2", 0.2)
    more += ("--adam_weight_decay", 0.4, "--adam_epsilon", 0.5)
    optimizer = build_optimizer(arguments(tmp_path, *more), weights(), 1)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 2
    assert (group["lr"], group["betas"]) == (0.3, (0.1, 0.2))
    assert (group["weight_decay"], group["eps"]) == (0.4, 0.5)


@pytest.mark.parametrize(("scaled", "expected"), [(False, 0.001), (True, 0.001 * 2 * 3 * 4)])
def test_scale_lr_multiplies_by_the_global_batch(
    tmp_path: Any, scaled: bool, expected: float
) -> None:
    more = ("--learning_rate", 0.001, "--train_batch_size", 2, "--gradient_accumulation_steps", 3)
    args = arguments(tmp_path, *more, *(["--scale_lr"] if scaled else []))
    assert build_optimizer(args, weights(), 4).param_groups[0]["lr"] == pytest.approx(expected)


def test_8_bit_adam_comes_from_bitsandbytes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    fake = ModuleType("bitsandbytes")
    fake.optim = type("optim", (), {"AdamW8bit": lambda *a, **k: made.append((a, k)) or "8"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    args = arguments(tmp_path)
    args.use_8bit_adam = True
    parameters = weights()
    assert build_optimizer(args, parameters, 1) == "8"
    ((positional, named),) = made
    assert positional == (parameters,)
    assert named["lr"] == args.learning_rate


def test_warm_up_and_decay_count_optimizer_steps(tmp_path: Any) -> None:
    args = arguments(
        tmp_path, "--lr_scheduler", "linear", "--lr_warmup_steps", 4, "--learning_rate", 1.0
    )
    expected = [0, 0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates(args, 10) == pytest.approx(expected)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("batch", [1, 8])
def test_rates_do_not_depend_on_the_batch(tmp_path: Any, accumulation: int, batch: int) -> None:
    more = ("--lr_scheduler", "cosine", "--lr_warmup_steps", 3)
    sizes = ("--gradient_accumulation_steps", accumulation, "--train_batch_size", batch)
    plain = arguments(tmp_path, *more, "--train_batch_size", 2)
    assert rates(arguments(tmp_path, *more, *sizes), 12) == rates(plain, 12)


def test_a_wrapped_optimizer_is_unwrapped(tmp_path: Any) -> None:
    inner = torch.optim.SGD(weights(), lr=1e-4)
    wrapper = type("Wrapped", (), {"optimizer": inner})()
    assert build_lr_scheduler(arguments(tmp_path), wrapper, 5).optimizer is inner
