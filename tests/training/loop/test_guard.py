"""An update from a loss or gradient that is not finite leaves every bit as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_curriculum.training.errors import NonFiniteError
from diffusers_curriculum.training.loop.guard import FiniteGuard, supports_found_inf
from tests.training.fake_accelerator import FakeAccelerator
from tests.training.tiny_state import value_bits

ROOT = Path(__file__).parents[3]
NAN, INF = torch.nan, torch.inf
OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 3)]


class Steps:
    """Two parameters under a guard; each update has one gradient value and one loss."""

    def __init__(self, build: Any, mode: str = "skip", accelerator: Any = None) -> None:
        self.parameters = weights()
        self.inner = build(self.parameters)
        self.optimizer: Any = self.inner
        self.guard = FiniteGuard(accelerator or FakeAccelerator(), self.inner, mode)

    def make(self, gradient: float, loss: float = 1.0) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.grad = torch.full_like(parameter, gradient if index else 1.0)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )
        self.guard.step([torch.ones(2), torch.tensor(loss)], norm)

    @property
    def bits(self) -> Any:
        state = [dict(self.inner.state[p]) for p in self.parameters]
        return value_bits([[p.detach() for p in self.parameters], state])


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    ("gradient", "loss"), [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (2.0, NAN), (2.0, INF)]
)
def test_a_fault_leaves_no_trace(build: Any, gradient: float, loss: float) -> None:
    faulty, sound = Steps(build), Steps(build)
    for steps, faults in ((faulty, True), (sound, False)):
        steps.make(0.3)
        before = steps.bits
        if faults:
            steps.make(gradient, loss)
            assert steps.bits == before
        steps.make(-0.7)
        assert steps.bits != before
    assert faulty.bits == sound.bits
    assert faulty.guard.check(3) == 1
    assert sound.guard.check(2) == 0


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_sound_updates_are_those_of_the_optimizer_alone(build: Any) -> None:
    steps, alone = Steps(build), Steps(build)
    for gradient in (0.3, -2.0, 1e-4):
        steps.make(gradient)
        for index, parameter in enumerate(alone.parameters):
            parameter.grad = torch.full_like(parameter, gradient if index else 1.0)
        alone.inner.step()
    assert steps.bits == alone.bits


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_without_the_guard_the_weights_are_lost(build: Any) -> None:
    steps = Steps(build)
    for parameter in steps.parameters:
        parameter.grad = torch.full_like(parameter, NAN)
    steps.inner.step()
    assert not any(p.isfinite().any() for p in steps.parameters)


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_guard_tells_whether_the_last_update_was_left_out(build: Any) -> None:
    steps, told = Steps(build), []
    for gradient, loss in ((0.3, 1.0), (NAN, 1.0), (0.3, INF), (0.3, 1.0)):
        steps.make(gradient, loss)
        told.append(bool(steps.guard.left_out))
    assert told == [False, True, True, False]


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_fault_in_the_very_first_update(build: Any) -> None:
    faulty, sound = Steps(build), Steps(build)
    faulty.make(NAN)
    assert all(torch.equal(p, q) for p, q in zip(faulty.parameters, weights(), strict=True))
    faulty.make(0.5)
    sound.make(0.5)
    assert faulty.bits == sound.bits


class Readings(TorchDispatchMode):
    """Counts the values that the host reads out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "reads"), [("fused AdamW", False), ("SGD", True)])
def test_the_host_waits_only_where_the_optimizer_cannot(name: str, reads: bool) -> None:
    steps = Steps(OPTIMIZERS[name])
    gradients = [torch.full_like(p, 2.0) for p in steps.parameters]
    for parameter, gradient in zip(steps.parameters, gradients, strict=True):
        parameter.grad = gradient
    with Readings() as readings:
        steps.guard.step([torch.tensor(1.0)], torch.tensor(2.0))
    assert (readings.count > 0) == reads


def test_what_understands_found_inf() -> None:
    understood = {n for n, build in OPTIMIZERS.items() if supports_found_inf(build(weights()))}
    assert understood == {"fused AdamW", "fused Adam"}


def test_a_checkpoint_of_an_optimizer_that_was_not_fused_is_guarded_too() -> None:
    before, steps = Steps(OPTIMIZERS["AdamW"]), Steps(OPTIMIZERS["fused AdamW"])
    before.make(0.3)
    steps.make(0.3)
    steps.inner.load_state_dict(before.inner.state_dict())
    kept = steps.bits
    steps.make(NAN)
    assert steps.bits == kept
    assert steps.guard.check(2) == 1


def test_found_inf_is_seen_by_no_other_step() -> None:
    steps = Steps(OPTIMIZERS["fused AdamW"])
    steps.make(NAN)
    assert not hasattr(steps.inner, "found_inf")
    kept = steps.bits
    for parameter in steps.parameters:
        parameter.grad = torch.ones_like(parameter)
    steps.inner.step()
    assert steps.bits != kept


def test_mode_raise_stops_at_the_first_fault_and_again_at_the_next_check() -> None:
    steps = Steps(OPTIMIZERS["fused AdamW"], "raise")
    steps.make(1.0)
    assert steps.guard.check(1) == 0
    steps.make(NAN)
    steps.make(1.0)
    for step in (3, 4):
        with pytest.raises(NonFiniteError, match=f"by step {step}.*lower --learning_rate"):
            steps.guard.check(step)


@pytest.mark.parametrize(("row", "stops"), [(9, False), (10, True)])
def test_mode_skip_stops_after_ten_in_a_row(row: int, stops: bool) -> None:
    steps = Steps(OPTIMIZERS["fused AdamW"])
    for gradient in (*[NAN] * 9, 1.0, *[NAN] * row, 1.0):  # read long after the row
        steps.make(gradient)
    if stops:
        with pytest.raises(NonFiniteError, match="10 updates in a row by step 21"):
            steps.guard.check(21)
    else:
        assert steps.guard.check(20) == 18


def test_a_row_goes_on_over_a_resume() -> None:
    first, second = (Steps(OPTIMIZERS["fused AdamW"]) for _ in range(2))
    for _ in range(6):
        first.make(NAN)
    assert first.guard.check(6) == 6
    saved = first.guard.state_dict()
    first.make(NAN)  # what was saved must not follow
    second.guard.load_state_dict(saved)
    for _ in range(3):
        second.make(NAN)
    assert second.guard.check(9) == 9
    second.make(NAN)
    with pytest.raises(NonFiniteError, match="10 updates in a row"):
        second.guard.check(10)


def test_faults_before_a_resume_do_not_stop_mode_raise() -> None:
    skipping, strict = (Steps(OPTIMIZERS["fused AdamW"], mode) for mode in ("skip", "raise"))
    skipping.make(NAN)
    strict.guard.load_state_dict(skipping.guard.state_dict())
    strict.make(1.0)
    assert strict.guard.check(2) == 1
    strict.make(NAN)
    with pytest.raises(NonFiniteError, match="by step 3"):
        strict.guard.check(3)


@pytest.mark.parametrize("main", [True, False])
def test_new_skips_are_told_once_by_the_main_process(
    main: bool, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Steps(OPTIMIZERS["fused AdamW"], accelerator=FakeAccelerator(main))
    told = []
    for number, gradient in enumerate((NAN, NAN, 1.0, NAN)):
        steps.make(gradient)
        if number:
            steps.guard.check(number + 1)
            told.append([record.getMessage() for record in caplog.records])
            caplog.clear()
    assert [len(messages) for messages in told] == ([1, 0, 1] if main else [0, 0, 0])
    if main:
        assert told[0][0].startswith("2 updates left out by step 2, 2 of them new")
        assert told[2][0].startswith("3 updates left out by step 4, 1 of them new")


def test_an_unknown_norm_leaves_the_losses() -> None:
    steps = Steps(OPTIMIZERS["fused AdamW"])
    steps.guard.step([torch.tensor(NAN)], None)
    steps.guard.step([torch.tensor(1.0)], None)
    assert steps.guard.check(2) == 1


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'ignore': choose from raise, skip"):
        FiniteGuard(SimpleNamespace(), None, "ignore")
