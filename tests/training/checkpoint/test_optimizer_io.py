"""The state of any optimizer comes back to the bit, or is refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from diffusers_curriculum.training.checkpoint.optimizer import load_optimizer_state, optimizer_state
from diffusers_curriculum.training.errors import CheckpointError
from diffusers_curriculum.training.storage.tensors import (
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)
from tests.training.tiny_state import value_bits

Make = Callable[[Iterable[Tensor]], Optimizer]


class Odd(Optimizer):
    """State of many kinds: numbers, a float64 and a byte tensor, an entry of no parameter."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "range": (0.0, float("inf")), "name": None})
        self.state["all"] = {"seen": 0}  # type: ignore[index]

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["sum"] = state.get("sum", torch.zeros((), dtype=torch.float64)) + 1 / 3
                state["code"] = torch.full(p.shape, 200, dtype=torch.uint8)
                state["history"] = [*state.get("history", []), float(p.grad.sum())]
                p.data.sub_(p.grad * (group["lr"] * float(state["sum"])))
        self.state["all"]["seen"] += 1  # type: ignore[index]


MAKERS: dict[str, Make] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.8, 0.99)),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=True, amsgrad=True),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "AdamW tensor lr": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01)),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=0.01),
    "Rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "odd": Odd,
}


def parameters(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (4,), (2, 3, 4, 4), ()]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[2] = made[2].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(p) for p in made]


def step(optimizer: Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
    optimizer.step()


def through_disk(optimizer: Optimizer, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, described = optimizer_state(optimizer)
    save_tensors(folder / "o.safetensors", tensors)
    write_json(folder / "o.json", described)
    return load_tensors(folder / "o.safetensors"), read_json(folder / "o.json")


def state_bits(optimizer: Optimizer) -> Any:
    return value_bits(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_round_trip_and_going_on(tmp_path: Path, name: str, steps: int, dtype: torch.dtype) -> None:
    first, second = parameters(0, dtype), parameters(0, dtype)
    straight, resumed = MAKERS[name](first), MAKERS[name](second)
    for number in range(steps):
        step(straight, number)
        straight.param_groups[0]["lr"] = straight.param_groups[0]["lr"] * 0.7
    step(resumed, 99)
    load_optimizer_state(resumed, *through_disk(straight, tmp_path))
    for p, q in zip(first, second, strict=True):
        q.data.copy_(p.data)
    assert state_bits(resumed) == state_bits(straight)
    for number in range(3):
        step(straight, number)
        step(resumed, number)
    assert state_bits(resumed) == state_bits(straight)
    assert value_bits(first) == value_bits(second)


def test_a_step_count_in_the_dtype_of_the_parameter_would_be_cast() -> None:
    """torch's own load_state_dict turns float32 averages of bfloat16 parameters into bfloat16."""
    first, second = (torch.optim.SGD(parameters(0, torch.bfloat16), momentum=0.9) for _ in "ab")
    step(first, 0)
    for state in first.state.values():
        state["momentum_buffer"] = torch.full_like(state["momentum_buffer"], 1 / 3).float() / 3
    plain = torch.optim.SGD(parameters(0, torch.bfloat16), momentum=0.9)
    plain.load_state_dict(first.state_dict())
    assert state_bits(plain) != state_bits(first)
    load_optimizer_state(second, *optimizer_state(first))
    assert state_bits(second) == state_bits(first)


def test_the_memory_layout_is_the_parameters(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(parameters(0))
    step(optimizer, 0)
    resumed = torch.optim.AdamW(parameters(1))
    load_optimizer_state(resumed, *through_disk(optimizer, tmp_path))
    image = resumed.param_groups[0]["params"][2]
    assert resumed.state[image]["exp_avg"].stride() == image.stride()
    assert not image.is_contiguous()


def test_the_loaded_state_shares_nothing_with_what_was_given() -> None:
    optimizer = torch.optim.AdamW(parameters(0))
    step(optimizer, 0)
    before = state_bits(optimizer)
    resumed = torch.optim.AdamW(parameters(0))
    load_optimizer_state(resumed, *optimizer_state(optimizer))
    step(resumed, 1)
    assert state_bits(optimizer) == before


def test_accelerates_wrapper_makes_no_difference(tmp_path: Path) -> None:
    wrapped = Accelerator(cpu=True).prepare(torch.optim.AdamW(parameters(0), lr=0.1))
    step(wrapped, 0)
    plain = torch.optim.AdamW(parameters(1))
    load_optimizer_state(plain, *through_disk(wrapped, tmp_path))
    assert state_bits(plain) == state_bits(wrapped)
    load_optimizer_state(wrapped, *through_disk(plain, tmp_path))
    assert state_bits(plain) == state_bits(wrapped)


@pytest.mark.parametrize("there", [False, True])
def test_what_newer_versions_of_torch_add_is_no_difference(there: bool) -> None:
    """A checkpoint goes from an older one to a newer one, and back."""
    first, second = parameters(0), parameters(0)
    saved, live = torch.optim.AdamW(first), torch.optim.AdamW(second)
    step(saved, 0)
    step(live, 99)
    tensors, described = optimizer_state(saved)
    for group, names in zip(described["groups"], described["hyperparameters"], strict=True):
        group.pop("decoupled_weight_decay", None)
        names[:] = [name for name in names if name != "decoupled_weight_decay"]
        if there:
            group["decoupled_weight_decay"] = True
            names.append("decoupled_weight_decay")
    load_optimizer_state(live, tensors, described)
    for p, q in zip(first, second, strict=True):
        q.data.copy_(p.data)
    for optimizer in (saved, live):
        step(optimizer, 1)
    assert value_bits(first) == value_bits(second)


def fewer() -> Optimizer:
    return torch.optim.AdamW(parameters(1)[:3])


def other_shape() -> Optimizer:
    first, _, *rest = parameters(1)
    return torch.optim.AdamW([first, torch.nn.Parameter(torch.zeros(5)), *rest])


def two_groups() -> Optimizer:
    first, *rest = parameters(1)
    return torch.optim.AdamW([{"params": [first]}, {"params": rest}])


def more_hyperparameters() -> Optimizer:
    return torch.optim.AdamW([{"params": parameters(1), "initial_lr": 0.1}])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (fewer, r"group sizes \[0\] is 4, the run's 3"),
        (other_shape, r"shapes \[1\] is \[4\], the run's \[5\]"),
        (two_groups, r"group sizes is \[4\], the run's \[1, 3\]"),
        (more_hyperparameters, r"hyperparameters \[0\].*initial_lr"),
        (lambda: torch.optim.Adam(parameters(1)), "class is 'AdamW', the run's 'Adam'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    make: Callable[[], Optimizer], match: str
) -> None:
    saved = torch.optim.AdamW(parameters(0))
    step(saved, 0)
    live = make()
    step(live, 1)
    before = state_bits(live)
    with pytest.raises(CheckpointError, match=match):
        load_optimizer_state(live, *optimizer_state(saved))
    assert state_bits(live) == before


def test_a_missing_tensor_is_refused_before_anything_changes() -> None:
    saved, live = (torch.optim.AdamW(parameters(seed)) for seed in (0, 1))
    step(saved, 0)
    step(live, 1)
    tensors, described = optimizer_state(saved)
    before = state_bits(live)
    tensors.popitem()
    with pytest.raises(CheckpointError, match="missing"):
        load_optimizer_state(live, tensors, described)
    assert state_bits(live) == before
