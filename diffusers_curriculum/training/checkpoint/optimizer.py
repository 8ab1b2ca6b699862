"""The state of any torch optimizer as tensors and JSON, exact to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffusers_curriculum.training.errors import CheckpointError
from diffusers_curriculum.training.storage.tensors import on_device_of, pack, unpack

# What Prodigy keeps among the hyperparameters of its groups, and finds while it trains
_FOUND = {"d", "d_max", "d_hat", "d_numerator", "d_denom", "k"}
# What groups of Adam and AdamW have in newer versions of torch only; it goes with the class
_NEWER = {"decoupled_weight_decay"}


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer as named tensors and a JSON description of all else.

    Returns:
        tensors: every tensor of the state, under names that the description refers to.
        described: class, shapes of the parameters, parameter groups, per-parameter state.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    described = {
        **_signature(optimizer),
        "groups": pack(state["param_groups"], tensors, "group"),
        "state": pack(state["state"], tensors, "state"),
        "devices": [p.device.type for p in _parameters(optimizer)],
    }
    # Which tensors live on the host beside a parameter on a device ("step" of AdamW does); others
    # may have been brought there from shards.
    on_device = any(kind != "cpu" for kind in described["devices"])
    on_host = (n for n, t in tensors.items() if _is_host(t) and not (on_device and t.ndim))
    described["on_host"] = sorted(on_host)
    return tensors, described


def load_optimizer_state(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], described: Mapping[str, Any]
) -> None:
    """Put the state of :func:`optimizer_state` into an optimizer with the same parameters, after
    :func:`check_optimizer_state`."""
    groups, state = check_optimizer_state(optimizer, tensors, described)
    optimizer.load_state_dict({"param_groups": groups, "state": state})
    on_host = {id(tensors[name]) for name in described["on_host"]}
    for index, parameter in enumerate(_parameters(optimizer)):
        same_device = described["devices"][index] == parameter.device.type != "cpu"
        entries = optimizer.state[parameter] if state.get(index) else {}
        for key, value in state.get(index, {}).items():
            if isinstance(value, Tensor):
                to_host = id(value) in on_host if same_device else _is_host(entries.get(key))
                entries[key] = _place(value, parameter, to_host)


def own_numbers(optimizer: Optimizer, lr_scheduler: Any = None) -> Callable[[], None]:
    """What puts the present hyperparameters back after a state was loaded: those of this run hold.

    The course of the learning rate goes on at the loaded position, with this run's base rates,
    shape and length.

    Args:
        lr_scheduler: a ``LambdaLR``, as every schedule of diffusers is; None: constant rates.
    """
    kept = _FOUND | {"params"}
    numbers = [{k: v for k, v in g.items() if k not in kept} for g in optimizer.param_groups]
    rates = None if lr_scheduler is None else list(lr_scheduler.base_lrs)

    def put_back() -> None:
        for group, own in zip(optimizer.param_groups, numbers, strict=True):
            group.update(own)
        if rates is not None:
            _set_rates(optimizer, lr_scheduler, rates)

    return put_back


def _set_rates(optimizer: Optimizer, lr_scheduler: Any, rates: list[Any]) -> None:
    """Those of the scheduler at its position, from these base rates."""
    rules, place = lr_scheduler.lr_lambdas, lr_scheduler.last_epoch
    now = [rate * rule(place) for rate, rule in zip(rates, rules, strict=True)]
    for group, rate in zip(optimizer.param_groups, now, strict=True):
        group["lr"] = rate
    lr_scheduler.base_lrs, lr_scheduler._last_lr = rates, now


def check_optimizer_state(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], described: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """Parameter groups and state as ``load_state_dict`` wants them, after a check that they fit."""
    for what, live in _signature(optimizer).items():
        saved = described.get(what)
        if what == "hyperparameters" and saved:
            saved, live = ([sorted({*names} - _NEWER) for names in each] for each in (saved, live))
        if saved != live:
            raise CheckpointError(
                "The checkpoint's optimizer does not fit this run: "
                f"{_difference(what, saved, live)}. Resume with the model and the arguments of "
                "the run that wrote it."
            )
    return unpack(described["groups"], tensors), unpack(described["state"], tensors)


def _signature(optimizer: Optimizer) -> dict[str, Any]:
    """What must be equal before a state may be loaded."""
    # accelerate wraps the optimizer; the wrapper must not matter.
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        "class": type(inner).__name__,
        "group sizes": [len(group["params"]) for group in optimizer.param_groups],
        "shapes": [list(parameter.shape) for parameter in _parameters(optimizer)],
        "hyperparameters": [sorted(group.keys() - {"params"}) for group in optimizer.param_groups],
    }


def _difference(what: str, saved: Any, live: Any) -> str:
    """Names the first difference, because a list of 600 shapes tells nobody anything."""
    if not (isinstance(saved, list) and isinstance(live, list)) or len(saved) != len(live):
        return f"its {what} is {saved!r}, the run's {live!r}"
    index = next(i for i, pair in enumerate(zip(saved, live, strict=True)) if pair[0] != pair[1])
    return f"its {what} [{index}] is {saved[index]!r}, the run's {live[index]!r}"


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """All parameters, in the order in which ``state_dict`` numbers them."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _is_host(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cpu"


def _place(value: Tensor, parameter: Tensor, to_host: bool) -> Tensor:
    """``load_state_dict`` casts to the parameter's dtype; this is the value as it was saved."""
    like = torch.empty(value.shape) if to_host and not _is_host(parameter) else parameter
    return on_device_of(value, like)
