"""Running out of memory: what was asked for, and what to change."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.errors import NonFiniteError, UsageError
from diffusers_curriculum.training.process.memory import (
    explain_out_of_memory,
    is_out_of_memory,
    kept_objects,
    out_of_memory_explained,
)
from tests.training.command_lines import parse_args

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
FAILED = [
    torch.OutOfMemoryError(CUDA),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
OTHERS = [
    RuntimeError("expected scalar type Half but found Float"),
    NonFiniteError("a loss was not finite"),
    UsageError("out of memory is what this value is called"),
    KeyError("out of memory"),
    KeyboardInterrupt(),
]


def arguments(tmp_path: Path, *more: object) -> Any:
    (tmp_path / "a.png").touch()
    argv = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path)]
    return parse_args([*argv, "--output_dir", str(tmp_path / "out"), *map(str, more)])


@pytest.mark.parametrize("error", FAILED, ids=str)
def test_a_failed_allocation_says_what_was_asked_for_and_what_to_do(
    error: Exception, tmp_path: Path
) -> None:
    args = arguments(tmp_path, "--train_batch_size", 12, "--resolution", 448)
    with pytest.raises(UsageError) as caught, out_of_memory_explained(args):
        raise error
    assert caught.value.__cause__ is error
    told = str(caught.value)
    assert "--train_batch_size 12, --gradient_accumulation_steps 1, --resolution 448" in told
    assert "--train_batch_size 6 --gradient_accumulation_steps 2: " in told
    for remedy in ("--gradient_checkpointing:", "--mixed_precision bf16:", "--resolution 192:"):
        assert remedy in told
    assert str(error)[:60] in told


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_every_other_error_passes_unchanged(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory_explained(arguments(tmp_path)):
        raise error
    assert caught.value is error
    assert caught.value.__cause__ is None
    assert not is_out_of_memory(error)


def test_a_real_failed_allocation_of_the_host_is_recognised(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="out of memory with --train_batch_size 16"),
        out_of_memory_explained(arguments(tmp_path)),
    ):
        torch.empty(2**60, dtype=torch.int8)


@pytest.mark.parametrize(
    ("batch", "accumulation", "advice"),
    [
        (2, 1, "--train_batch_size 1 --gradient_accumulation_steps 2"),
        (3, 2, "--train_batch_size 1 --gradient_accumulation_steps 6"),
        (9, 1, "--train_batch_size 3 --gradient_accumulation_steps 3"),
        (16, 4, "--train_batch_size 8 --gradient_accumulation_steps 8"),
    ],
)
def test_the_smaller_batch_keeps_the_updates(
    batch: int, accumulation: int, advice: str, tmp_path: Path
) -> None:
    more = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    assert advice + ":" in str(explain_out_of_memory(FAILED[0], arguments(tmp_path, *more)))


def test_only_what_is_not_done_already_is_advised(tmp_path: Path) -> None:
    args = arguments(tmp_path, "--use_ema", "--resolution", 64)
    args.train_batch_size, args.gradient_checkpointing = 1, True
    args.mixed_precision, args.use_8bit_adam = "bf16", True
    args.cache_text_embeddings = args.offload = True
    told = str(explain_out_of_memory(FAILED[0], args))
    assert [line.split(":")[0] for line in told.splitlines() if line.startswith("  - ")] == [
        "  - --offload_ema",
        "  - a device with more memory, or one that no other program uses",
    ]
    args.offload_ema = True
    assert "--offload_ema" not in str(explain_out_of_memory(FAILED[0], args))


FAULTS = """
import resource, torch
from diffusers_curriculum.training.process.memory import keep_freed_memory
kept = keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(2**21) for _ in range(10)]
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of its own")
def test_what_a_step_frees_is_kept_for_the_next_unless_the_environment_says_more() -> None:
    """80 MiB are 20,480 pages, each fetched anew where it was handed back."""
    told = {}
    for name, more in {"kept": {}, "handed back": {"MALLOC_TOP_PAD_": "0"}}.items():
        known = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", FAULTS]
        done = subprocess.run(command, env=known | more, capture_output=True, text=True, check=True)
        told[name] = [int(word) for word in done.stdout.split()]
    assert told["kept"][0] == 1
    assert told["kept"][1] < 1000
    assert told["handed back"][0] == 0
    assert told["handed back"][1] > 10_000


def test_objects_of_before_are_no_garbage_until_the_end() -> None:
    with kept_objects():
        known = gc.get_freeze_count()
        with kept_objects():
            assert gc.get_freeze_count() >= known > 10_000
    assert gc.get_freeze_count() == 0
