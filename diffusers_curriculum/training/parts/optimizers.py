"""The optimizer and its learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from diffusers_curriculum.training.arguments.command_line import Arguments


def build_optimizer(args: Arguments, parameters: Sequence[nn.Parameter], num_processes: int) -> Any:
    """AdamW, or its 8-bit form from bitsandbytes; --scale_lr multiplies the rate by the size of
    the global batch."""
    scale = 1
    if args.scale_lr:
        scale = args.gradient_accumulation_steps * args.train_batch_size * num_processes
    settings: dict[str, Any] = {
        "lr": args.learning_rate * scale,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    # the fused kernels can leave an update out without asking the host
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(parameters, fused=fused, **settings)


def build_lr_scheduler(args: Arguments, optimizer: Any, max_train_steps: int) -> Any:
    """diffusers' learning rate scheduler in optimizer steps.

    It is stepped once per optimizer step and not prepared by accelerate, so that the rates are the
    same for any number of processes and any accumulation.
    """
    return get_scheduler(
        args.lr_scheduler,
        optimizer=getattr(optimizer, "optimizer", optimizer),
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )
