"""What to do when memory runs out, in numbers."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch

from diffusers_curriculum.training.errors import UsageError

# Backends that raise a plain RuntimeError.
_MESSAGES = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class OutOfMemoryError(UsageError):
    """The arguments need more memory than there is; a script exits with status 2."""


@contextlib.contextmanager
def out_of_memory_explained(args: argparse.Namespace) -> Iterator[None]:
    """Turn a failed allocation into advice; every other exception passes unchanged.

    Raises:
        OutOfMemoryError: see :func:`explain_out_of_memory`.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(error, args) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a failed allocation of tensors, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def explain_out_of_memory(error: BaseException, args: argparse.Namespace) -> OutOfMemoryError:
    """What was asked for, and every remedy that is still open, as an exception to raise."""
    wanted = (
        f"--train_batch_size {args.train_batch_size}, --gradient_accumulation_steps "
        f"{args.gradient_accumulation_steps}, --resolution {args.resolution}, "
        f"--mixed_precision {args.mixed_precision or 'no'}"
    )
    remedies = "".join(f"\n  - {remedy}" for remedy in _remedies(args))
    # Two lines of torch's message hold the numbers; the rest is about its allocator's settings.
    told = " ".join(str(error).split())[:300]
    return OutOfMemoryError(
        f"out of memory with {wanted}. Any of these needs less:{remedies}\n"
        "Saved checkpoints are intact: add --resume_from_checkpoint latest. "
        f"The allocator said: {told}"
    )


def _remedies(args: argparse.Namespace) -> Iterator[str]:
    """Those that are not in use already, the cheapest in quality and time first."""
    batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    if batch > 1:
        smaller = max(size for size in range(1, batch) if batch % size == 0)
        yield (
            f"--train_batch_size {smaller} --gradient_accumulation_steps "
            f"{accumulation * batch // smaller}: the same updates, in smaller pieces"
        )
    if not args.gradient_checkpointing:
        yield "--gradient_checkpointing: activations are computed twice instead of kept"
    if args.mixed_precision not in ("bf16", "fp16"):
        yield "--mixed_precision bf16: half the size of activations and frozen models"
    if not getattr(args, "use_8bit_adam", True):
        yield "--use_8bit_adam: a quarter of the optimizer's state (needs bitsandbytes)"
    if args.use_ema and not args.offload_ema:
        yield "--offload_ema: the averaged weights wait on the host"
    if args.resolution > 64:
        lower = max(64, args.resolution // 2 // 64 * 64)
        yield f"--resolution {lower}: a quarter of the pixels, or anything between"
    yield "a device with more memory, or one that no other program uses"
