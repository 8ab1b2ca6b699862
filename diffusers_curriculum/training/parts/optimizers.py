"""The optimizer and its learning rate."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from torch import nn

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.optimizer import Optimizer, chosen_optimizer
from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

_LR_END = 1e-7  # diffusers' default


def base_rate(args: Arguments, num_processes: int) -> float:
    """The learning rate after warm-up; --scale_lr multiplies it by the size of the global batch."""
    if not args.scale_lr:
        return args.learning_rate
    scale = args.gradient_accumulation_steps * args.train_batch_size * num_processes
    return args.learning_rate * scale


def check_rates(args: Arguments, num_processes: int, max_train_steps: int) -> None:
    """Look at the course of the learning rate before any model is loaded.

    Raises:
        UsageError: a polynomial decay that would not fall, or a number that the optimizer refuses.
    """
    rate, end = base_rate(args, num_processes), _end(args)
    _check_numbers(args, chosen_optimizer(args))
    if args.lr_scheduler == "polynomial" and rate <= end:
        raise UsageError(
            f"--lr_end is {end:g}, which is not below the learning rate {rate:g} that "
            "--lr_scheduler polynomial falls from: give a lower --lr_end or a higher "
            "--learning_rate."
        )
    steps = args.lr_warmup_steps
    if args.lr_scheduler == "constant":
        if steps and "lr_warmup_steps" in args.given:
            logger.warning(
                "--lr_warmup_steps %d has no effect with --lr_scheduler constant: "
                "constant_with_warmup has a warm-up.",
                steps,
            )
    elif steps >= max_train_steps:
        logger.warning(
            "--lr_warmup_steps %d is not shorter than the run of %d steps: the learning rate "
            "does not come to %g, and there is no decay.",
            steps,
            max_train_steps,
            rate,
        )


def _check_numbers(args: Arguments, chosen: Optimizer) -> None:
    for name, usual in chosen.above_zero.items():
        if args[name] == 0:
            raise UsageError(
                f"--{name} is 0, which --optimizer {args.optimizer} refuses: {usual} is usual."
            )
    if chosen.finds_scale and args.learning_rate <= 0.1:
        logger.warning(
            "--learning_rate %g with --optimizer %s multiplies a rate that it finds by itself: 1 "
            "is usual.",
            args.learning_rate,
            args.optimizer,
        )


def build_optimizer(
    args: Arguments, parameters: Sequence[nn.Parameter], num_processes: int, network: Any = None
) -> Any:
    """The optimizer that the command line asks for.

    Args:
        network: whose embeddings are no matrices to an optimizer that takes matrices only.
    """
    chosen, rate = chosen_optimizer(args), base_rate(args, num_processes)
    if chosen.beside is None:
        return _built(chosen, args, rate, parameters)
    modules = [] if network is None else network.modules()
    tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in tables]
    others = [p for p in parameters if p.ndim != 2 or id(p) in tables]
    pairs = ((chosen, matrices), (chosen.beside, others))
    return Together([_built(kind, args, rate, own) for kind, own in pairs if own])


def check_optimizer(args: Arguments) -> None:
    """Let an optimizer that cannot be built be told before models are loaded and caches filled;
    what it raises is left as it is."""
    build_optimizer(args, [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))], 1)


def _built(
    kind: Optimizer, args: Arguments, rate: float, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    module, _, name = kind.kind.rpartition(".")
    settings = kind.arguments(args)
    if kind.fused:
        settings["fused"] = all(p.device.type in ("cpu", "cuda") for p in parameters)
    with redirect_stdout(io.StringIO()):  # prodigyopt prints that weights decay
        optimizer = getattr(import_module(module), name)(parameters, lr=rate, **settings)
    for group in optimizer.param_groups:
        group |= kind.group
    return optimizer


class Together(torch.optim.Optimizer):
    """Several optimizers as one, each with a group of parameters of its own."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = members
        super().__init__([group for each in members for group in each.param_groups], {})

    def step(self, closure: Any = None) -> None:
        """Let each step on its group; the state is the whole one's, which may have been loaded."""
        for member, group in zip(self.members, self.param_groups, strict=True):
            member.param_groups, member.state = [group], self.state
            member.step()


def build_lr_scheduler(args: Arguments, optimizer: Any, max_train_steps: int) -> Any:
    """diffusers' learning rate scheduler in optimizer steps.

    It is stepped once per optimizer step and not prepared by accelerate, so that the rates are the
    same for any number of processes and any accumulation.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    length = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": max_train_steps}
    if args.lr_scheduler == "polynomial":  # whose end get_scheduler does not pass on
        shape = {"power": args.lr_power or 1.0, "lr_end": _end(args)}
        return get_polynomial_decay_schedule_with_warmup(inner, **length, **shape)
    return get_scheduler(args.lr_scheduler, inner, **length, num_cycles=args.lr_num_cycles or 1)


def _end(args: Arguments) -> float:
    return _LR_END if args.lr_end is None else args.lr_end
