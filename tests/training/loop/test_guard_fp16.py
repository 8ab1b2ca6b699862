"""Under fp16 the gradient scaler decides which updates are left out; the guard looks on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from diffusers_curriculum.training.errors import NonFiniteError
from diffusers_curriculum.training.loop.guard import FiniteGuard
from tests.training.tiny_state import value_bits

NAN, INF = torch.nan, torch.inf


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 3)]


@pytest.fixture
def scaled() -> Iterator[Any]:
    """Builds a fused AdamW under a scaler, as accelerate prepares it, and a guard."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()

    def build(mode: str) -> tuple[FiniteGuard, list[torch.nn.Parameter], Any]:
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        parameters = weights()
        inner = torch.optim.AdamW(parameters, lr=0.1, fused=True)
        optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=accelerator.scaler)
        return FiniteGuard(accelerator, optimizer, mode), parameters, accelerator.scaler

    yield build
    for state in states:
        state._reset_state()


def scaled_step(
    guard: FiniteGuard, parameters: Sequence[Tensor], scaler: Any, factor: float, loss: float = 1.0
) -> None:
    """Backward, unscale and clip as accelerate does it, and a guarded step."""
    guard.optimizer.zero_grad()
    total = sum((p * factor).sum() for p in parameters)
    scaler.scale(total).backward()
    scaler.unscale_(guard.optimizer.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    guard.step([torch.tensor(loss)], norm)


def test_an_overflow_lowers_the_scale_and_is_no_fault(scaled: Any) -> None:
    guard, parameters, scaler = scaled("raise")
    scaled_step(guard, parameters, scaler, 0.5)
    kept = value_bits([p.detach() for p in parameters])
    scaled_step(guard, parameters, scaler, INF)
    assert value_bits([p.detach() for p in parameters]) == kept
    assert scaler.get_scale() == 512.0
    assert guard.check(2) == 0
    assert bool(guard.left_out)
    scaled_step(guard, parameters, scaler, 0.5)
    assert not bool(guard.left_out)
    assert value_bits([p.detach() for p in parameters]) != kept


def test_a_loss_is_a_fault_under_a_scaler_too(scaled: Any) -> None:
    guard, parameters, scaler = scaled("raise")
    scaled_step(guard, parameters, scaler, NAN, loss=NAN)
    with pytest.raises(NonFiniteError, match="by step 1"):
        guard.check(1)


@pytest.mark.parametrize("overflows", [31, 32])
def test_a_scale_that_collapses_is_a_fault(scaled: Any, overflows: int) -> None:
    guard, parameters, scaler = scaled("skip")
    for _ in range(overflows):
        scaled_step(guard, parameters, scaler, INF)
    if overflows < 32:
        assert guard.check(overflows) == 0
    else:
        with pytest.raises(NonFiniteError, match="overflowed fp16 in 32 updates in a row"):
            guard.check(overflows)
