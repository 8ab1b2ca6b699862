"""One of two gloo processes that train a layer, with faults and signals on one of them only.

python -m tests.training.guard_driver RANK STORE_FILE REPORT.json
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusers_curriculum.training.errors import NonFiniteError
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.process.stopping import StopRequest

STEPS = 6
NAN_INPUT = (2, 1)  # step and rank: gradients become NaN everywhere
INFINITE_LOSS = (4, 0)  # all gradients stay finite, so nobody else could know


def guarded_step(
    model: Any, guard: FiniteGuard, step: int, rank: int, faults: bool = True
) -> tuple[bool, float]:
    """One update of two micro-batches' losses; whether the gradients were finite, and the loss."""
    x = torch.ones(2, 3) * (step + 1) * (rank + 1)
    if faults and (step, rank) == NAN_INPUT:
        x[0, 0] = torch.nan
    loss = model(x).square().mean()
    guard.accelerator.backward(loss)
    norm = guard.accelerator.clip_grad_norm_(model.parameters(), 1.0)
    told = loss.detach()
    if faults and (step, rank) == INFINITE_LOSS:
        told = torch.tensor(torch.inf)
    guard.step([told, torch.zeros(2)], norm)
    guard.optimizer.zero_grad()
    return bool(norm.isfinite()), float(told)


def skipping(model: Any, optimizer: Any, accelerator: Any, rank: int) -> dict[str, Any]:
    """Bits after each step in mode skip, and the counts."""
    guard, report = FiniteGuard(accelerator, optimizer, "skip"), []
    for step in range(STEPS):
        finite, _ = guarded_step(model, guard, step, rank)
        states = [model.module.state_dict(), *optimizer.optimizer.state.values()]
        bits = [t.detach().numpy().tobytes().hex() for s in states for t in s.values()]
        left_out = bool(guard.left_out)
        report.append({"bits": bits, "gradients": finite, "left_out": left_out})
    return {"steps": report, "skipped": guard.check(STEPS)}


def raising(model: Any, optimizer: Any, accelerator: Any, rank: int) -> list[int]:
    """The steps after which mode raise stops."""
    guard, raised = FiniteGuard(accelerator, optimizer), []
    for step in range(STEPS):
        guarded_step(model, guard, step, rank)
        try:
            guard.check(step + 1)
        except NonFiniteError:
            raised.append(step + 1)
    return raised


def stopped_by_signal(rank: int) -> tuple[int, int]:
    """The last step and the exit status when process 1 alone gets a SIGTERM in step 3."""
    with StopRequest() as stop:
        for step in range(8):
            if (step, rank) == (3, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.requested(step + 1):
                return step + 1, stop.stopped().status
    return -1, -1


def stopped_by_clock(rank: int) -> tuple[int, int]:
    """The same when the time is up for process 0 alone, in step 5."""
    times = iter(range(0, 100 * 3600, 3600))
    stop = StopRequest(6.5, (lambda: next(times)) if rank == 0 else (lambda: 0.0))
    for step in range(8):
        if stop.requested(step + 1):
            return step + 1, stop.stopped().status
    return -1, -1


def observe(rank: int) -> dict[str, Any]:
    """Everything that the test asks for."""
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, 0.5)
    torch.nn.init.constant_(layer.bias, 0.1)
    inner = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    model, optimizer = accelerator.prepare(layer, inner)
    return {
        "processes": accelerator.num_processes,
        "skip": skipping(model, optimizer, accelerator, rank),
        "raised": raising(model, optimizer, accelerator, rank),
        "signal": stopped_by_signal(rank),
        "clock": stopped_by_clock(rank),
    }


def main(rank: int, store: str, report: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # asked for, though the processes meet in a file
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    Path(report).write_text(json.dumps(observe(rank)))
    # The wrapped model must go before the group: as the last owner it would wait, holding the
    # interpreter's lock, for the group's threads, and these for the lock.
    Accelerator(cpu=True).free_memory()
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
