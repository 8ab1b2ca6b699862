"""The optimizer and its learning rate."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from torch import nn

from diffusers_curriculum.training.arguments.command_line import Arguments
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
    if args.optimizer == "prodigy":
        _check_prodigy(args)
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


def build_optimizer(args: Arguments, parameters: Sequence[nn.Parameter], num_processes: int) -> Any:
    """AdamW, its 8-bit form from bitsandbytes, or Prodigy."""
    settings: dict[str, Any] = {
        "lr": base_rate(args, num_processes),
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "prodigy":
        return _prodigy(args, parameters, settings)
    if args.use_8bit_adam:
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    # the fused kernels can leave an update out without asking the host
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(parameters, fused=fused, **settings)


def _check_prodigy(args: Arguments) -> None:
    rate = args.learning_rate
    for name, usual in (("learning_rate", "1"), ("adam_epsilon", "1e-8")):
        if args[name] == 0:
            raise UsageError(f"--{name} is 0, which --optimizer prodigy refuses: {usual} is usual.")
    if rate <= 0.1:
        logger.warning(
            "--learning_rate %g with --optimizer prodigy multiplies a rate that it finds by "
            "itself: 1 is usual.",
            rate,
        )


def _prodigy(args: Arguments, parameters: Sequence[nn.Parameter], settings: dict[str, Any]) -> Any:
    """Prodigy (arXiv 2306.06101), with the settings of diffusers' scripts."""
    from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]

    with redirect_stdout(io.StringIO()):  # it prints that weights decay
        optimizer = Prodigy(
            parameters,
            **settings,
            beta3=args.prodigy_beta3,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    for group in optimizer.param_groups:  # which its first step would add
        group |= {"d_denom": 0.0, "d_hat": group["d0"]}
    return optimizer


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
