"""What to do when memory runs out, in numbers; what is kept of it from step to step; and what is on
the device only while it is used."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import OutOfMemoryError

# Backends that raise a plain RuntimeError.
_MESSAGES = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


# Parameters of glibc's mallopt, and the largest threshold of blocks that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST = -1, -3, 32 * 2**20


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc keep what a step on the CPU frees for the next one: by default it may hand the
    pages back after each, and the kernel fills them with zeros anew.

    Returns:
        Whether it does now: not with another allocator than glibc's, nor where a variable of the
        environment says what it should do.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def kept_objects() -> Iterator[None]:
    """Inside the block Python looks for garbage among new objects alone: among all that libraries
    have made by then it takes a quarter of a second each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def lent(device: torch.device, *models: nn.Module, only: bool = True) -> Iterator[None]:
    """Models are on a device inside the block, and then where they were; nothing is done unless
    ``only`` for the block."""
    from diffusers.training_utils import offload_models  # whose import takes seconds

    with offload_models(*models, device=device, offload=only):
        yield


@contextlib.contextmanager
def out_of_memory_explained(args: Arguments) -> Iterator[None]:
    """Turn a failed allocation into an OutOfMemoryError that advises; see
    :func:`explain_out_of_memory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(error, args) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a failed allocation of tensors, on a device or on the host."""
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


def explain_out_of_memory(error: BaseException, args: Arguments) -> OutOfMemoryError:
    """What was asked for, and every remedy that is still open, as an exception to raise."""
    names = ("train_batch_size", "gradient_accumulation_steps", "resolution", "mixed_precision")
    given = {flag.name: args[flag.dest] for flag in args.flags if flag.name in names}
    wanted = ", ".join(f"--{name} {given[name] or 'no'}" for name in names if name in given)
    remedies = "".join(f"\n  - {remedy}" for remedy in _remedies(args))
    # Two lines of torch's message hold the numbers; the rest is about its allocator's settings.
    told = " ".join(str(error).split())[:300]
    return OutOfMemoryError(
        f"out of memory with {wanted}. Any of these needs less:{remedies}\n"
        "Saved checkpoints are intact: add --resume_from_checkpoint latest. "
        f"The allocator said: {told}"
    )


def _remedies(args: Arguments) -> Iterator[str]:
    """Those that are not in use already, the cheapest in quality and time first."""
    batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    if batch > 1:
        smaller = max(size for size in range(1, batch) if batch % size == 0)
        yield (
            f"--train_batch_size {smaller} --gradient_accumulation_steps "
            f"{accumulation * batch // smaller}: the same updates, in smaller pieces"
        )
    if args.is_open("gradient_checkpointing"):
        yield "--gradient_checkpointing: activations are computed twice instead of kept"
    if args.mixed_precision not in ("bf16", "fp16"):
        yield "--mixed_precision bf16: half the size of activations and frozen models"
    if args.is_open("cache_text_embeddings"):
        yield "--cache_text_embeddings: captions are encoded once, and their encoders are freed"
    if args.is_open("quantize_base"):
        yield "--quantize_base 4bit: a quarter of the frozen network (needs bitsandbytes)"
    if args.is_open("offload"):
        yield f"--{args.flag('offload')}: autoencoder and text encoders wait on the host"
    if args.is_open("use_8bit_adam"):
        yield "--use_8bit_adam: a quarter of the optimizer's state (needs bitsandbytes)"
    if args.is_open("offload_ema"):
        yield "--offload_ema: the averaged weights wait on the host"
    resolution = next((args.resolution for f in args.flags if f.name == "resolution"), 0)
    if resolution > 64:
        lower = max(64, resolution // 2 // 64 * 64)
        yield f"--resolution {lower}: a quarter of the pixels, or anything between"
    yield "a device with more memory, or one that no other program uses"
