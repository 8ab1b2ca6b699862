"""The optimizer, and rates that depend on steps alone."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.optimizers import (
    build_lr_scheduler,
    build_optimizer,
    check_rates,
)
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
    fake = ModuleType("bitsandbytes.optim")
    fake.AdamW8bit = lambda p, **k: made.append(k) or torch.optim.SGD(p)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    args = arguments(tmp_path, "--learning_rate", 0.3, "--adam_beta1", 0.1, "--adam_epsilon", 0.5)
    args.use_8bit_adam = True
    build_optimizer(args, weights(), 1)
    assert made == [{"lr": 0.3, "betas": (0.1, 0.999), "weight_decay": 0.01, "eps": 0.5}]


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


def test_a_polynomial_falls_to_its_end_with_its_power(tmp_path: Any) -> None:
    more = ("--lr_scheduler", "polynomial", "--lr_warmup_steps", 0, "--learning_rate", 1.0)
    args = arguments(tmp_path, *more, "--lr_power", 2, "--lr_end", 0.2)
    assert rates(args, 10) == pytest.approx([0.8 * (1 - i / 10) ** 2 + 0.2 for i in range(10)])


def test_cycles_start_again(tmp_path: Any) -> None:
    more = ("--lr_scheduler", "cosine_with_restarts", "--lr_warmup_steps", 0, "--learning_rate", 1)
    told = rates(arguments(tmp_path, *more, "--lr_num_cycles", 3), 12)
    assert told == pytest.approx(told[:4] * 3)
    assert told[0] == 1.0
    assert rates(arguments(tmp_path, *more), 12)[4] < 1.0


@pytest.mark.parametrize(
    "more", [("--lr_power", 2), ("--lr_end", 0), ("--lr_num_cycles", 2, "--lr_scheduler", "cosine")]
)
def test_a_shape_without_its_schedule_is_refused(tmp_path: Any, more: tuple[object, ...]) -> None:
    with pytest.raises(UsageError, match=r"no effect without --lr_scheduler"):
        arguments(tmp_path, *more)


def test_new_flags_change_no_facts_unless_they_are_given(tmp_path: Any) -> None:
    more = ("--lr_scheduler", "polynomial")
    told = arguments(tmp_path, *more).of_setting("optimizer")
    assert not {"lr_end", "lr_power", "lr_num_cycles"} & told.keys()
    assert arguments(tmp_path, *more, "--lr_end", 0).of_setting("optimizer")["lr_end"] == 0


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        (("--learning_rate", 1e-8), True),
        (("--learning_rate", 1e-3, "--lr_end", 1e-3), True),
        (("--learning_rate", 1e-3), False),
        (("--learning_rate", 1e-8, "--scale_lr", "--train_batch_size", 16), False),
    ],
)
def test_a_polynomial_that_would_not_fall_is_refused(
    tmp_path: Any, more: tuple[object, ...], refused: bool
) -> None:
    args = arguments(tmp_path, "--lr_scheduler", "polynomial", "--lr_warmup_steps", 0, *more)
    if not refused:
        check_rates(args, 1, 10)
        build_lr_scheduler(args, build_optimizer(args, weights(), 1), 10)
        return
    with pytest.raises(UsageError, match=r"--lr_end is .*lower --lr_end or a higher"):
        check_rates(args, 1, 10)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--lr_scheduler", "cosine"), "500 is not shorter than the run of 10 steps"),
        (("--lr_scheduler", "cosine", "--lr_warmup_steps", 9), ""),
        ((), ""),
        (("--lr_warmup_steps", 5), "no effect with --lr_scheduler constant"),
        (("--lr_warmup_steps", 0), ""),
    ],
)
def test_a_warm_up_in_vain_is_told(
    tmp_path: Any, more: tuple[object, ...], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_rates(arguments(tmp_path, *more), 1, 10)
    assert told in caplog.text
    assert bool(caplog.text) == bool(told)
