"""The training step on a device that cannot be read back: torch's meta device.

Whatever would make the host wait for a GPU (`.item()`, a condition on a tensor, a copy to the host)
has no value to give there and raises; so does a tensor that was left on the CPU. What a step copies
to the device is recorded: it must be queued, not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import train_text_to_image_curriculum as script
from benchmarks.gpu import subject
from diffusers_curriculum.noise_levels import to_device
from diffusers_curriculum.training.loop import guard
from diffusers_curriculum.training.loop.monitor import LevelMonitor
from diffusers_curriculum.training.loop.run import LevelRun

META = torch.device("meta")
WARM_UP = 2


class Copies(TorchDispatchMode):
    """Records the copies from the CPU to the device: (elements, whether they are queued)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if kind_of(source) == "cpu" and kind_of(out) == "meta":
            self.found.append((out.numel(), bool((kwargs or {}).get("non_blocking"))))
        return out


def kind_of(value: Any) -> str | None:
    return value.device.type if isinstance(value, torch.Tensor) else None


@pytest.fixture
def stepper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Builds a function that makes one step of two micro-batches on the meta device."""
    monkeypatch.setattr(Accelerator, "device", property(lambda self: META))
    monkeypatch.setattr(script, "gaussian", no_numbers)
    # meta has no fused kernels, which read found_inf on the device: there the step is plain
    monkeypatch.setattr(guard, "supports_found_inf", lambda _: True)
    monkeypatch.setattr(guard.FiniteGuard, "_step_on_device", lambda _, inner, bad: inner.step())

    def build(*flags: str) -> Any:
        accelerator = subject.new_accelerator(torch.device("cpu"), "no", 2)
        models = subject.build_models(subject.SMALL, META, torch.float32)
        run = subject.build_run(accelerator, models, "--use_ema", *flags)
        run.levels.start(0, META)
        monitor = monitor_of(run)
        plan = subject.batch_plan(4, 2)
        batches = subject.host_batches(subject.SMALL, 4, pinned=False)

        def step(number: int) -> None:
            monitor.add(number, *subject.update(run, number, plan, batches))

        return step

    yield build
    subject.reset_accelerate()


def monitor_of(run: LevelRun) -> LevelMonitor:
    return LevelMonitor(
        run.levels,
        1000,
        accelerator=run.accelerator,
        guard=run.guard,
        max_train_steps=100,
        log_every=10,
        plan=subject.batch_plan(4, 2),
    )


def no_numbers(shape: Any, *, slots: Any, device: Any, **_: Any) -> torch.Tensor:
    return torch.empty((slots.count, *shape), device=device)  # meta has no random generator


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "flags",
    [
        subject.UNIFORM,
        subject.LAPLACE,
        subject.CURRICULUM,
        (*subject.CURRICULUM, "--curriculum_within", "balanced", "--importance_correction", "full"),
        (*subject.CURRICULUM, "--foreach_ema", "--noise_offset", "0.1"),
        ("--timestep_draw", "sobol", "--input_perturbation", "0.1"),
    ],
)
def test_a_step_reads_nothing_back_and_waits_for_no_copy(stepper: Any, flags: Any) -> None:
    step = stepper(*flags)
    for number in range(WARM_UP):
        step(number)
    with Copies() as copies:
        step(WARM_UP)
    size, small = subject.SMALL.resolution, subject.SMALL
    once = sorted([4 * 3 * size * size, 4 * small.text_length, 4])  # images, tokens, u
    assert sorted(copies.found) == sorted((n, True) for n in once for _ in range(2))


def test_a_reading_step_is_found(stepper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = stepper()
    monkeypatch.setattr(LevelMonitor, "add", lambda self, step, outcome, _: outcome.loss[0].item())
    with pytest.raises(RuntimeError, match="meta"):
        step(0)


def test_a_waiting_copy_is_found() -> None:
    with Copies() as copies:
        torch.ones(3).to(META)
        torch.empty(5, device=META).copy_(torch.ones(5))
    assert copies.found == [(3, False), (5, False)]


class FakeTensor:
    """Stands for a CPU tensor; notes what is asked of it."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def pin_memory(self) -> FakeTensor:
        self.asked.append("pin_memory")
        return self

    def float(self) -> FakeTensor:
        self.asked.append("float")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> FakeTensor:
        self.asked.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("device", "asked"),
    [
        ("cuda", ["pin_memory", ("cuda", True)]),
        ("cuda:1", ["pin_memory", ("cuda", True)]),
        ("cpu", [("cpu", False)]),
        ("mps", ["float", ("mps", False)]),
    ],
)
def test_tables_go_to_cuda_from_pinned_memory(device: str, asked: list[Any]) -> None:
    table: Any = FakeTensor()
    to_device(table, device)
    assert table.asked == asked
