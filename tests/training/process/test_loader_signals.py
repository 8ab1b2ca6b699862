"""Stop signals to a whole process group end neither the loader processes nor the step."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_curriculum.training.process.stopping import ignore_stop_signals


def loading(init: Any) -> tuple[Any, list[Any]]:
    """An iterator over 40 batches, the first of which have come from either of its processes."""
    dataset: Any = list(range(40))
    batches: Any = iter(
        DataLoader(dataset, num_workers=2, persistent_workers=True, worker_init_fn=init)
    )
    return batches, [next(batches) for _ in range(2)]


def send_from_elsewhere(number: signal.Signals, process: int) -> None:
    """As a scheduler would: from a process that is not the parent."""
    subprocess.run(["kill", f"-{number.value}", str(process)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_loader_processes_leave_signals_to_the_training_process(number: signal.Signals) -> None:
    batches, first = loading(ignore_stop_signals)
    for worker in batches._workers:
        send_from_elsewhere(number, worker.pid)
        send_from_elsewhere(number, worker.pid)
    assert torch.cat([*first, *batches]).tolist() == list(range(40))
    batches._shutdown_workers()


def end_first_worker_and_load(batches: Any) -> None:
    send_from_elsewhere(signal.SIGTERM, batches._workers[0].pid)
    batches._workers[0].join(30)
    list(batches)


def test_without_that_they_die_and_take_the_step_with_them() -> None:
    batches, _ = loading(None)
    # torch says so at any moment, unless the connection to the dead process is noticed first
    with pytest.raises((RuntimeError, EOFError, ConnectionError)):
        end_first_worker_and_load(batches)
    batches._shutdown_workers()


def test_a_loader_process_obeys_its_parent() -> None:
    """Else a training process that fails would wait for it for ever."""
    batches, _ = loading(ignore_stop_signals)
    worker = batches._workers[0]
    send_from_elsewhere(signal.SIGTERM, worker.pid)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
    with contextlib.suppress(RuntimeError):  # torch has noticed
        batches._shutdown_workers()


def test_a_training_process_that_fails_does_not_wait_for_its_loaders() -> None:
    """The exception holds the iterator, so that only the end of the interpreter ends them."""
    script = (
        "from torch.utils.data import DataLoader\n"
        "from diffusers_curriculum.training.process.stopping import ignore_stop_signals\n"
        "loader = DataLoader(list(range(9)), num_workers=2, persistent_workers=True,\n"
        "                    worker_init_fn=ignore_stop_signals)\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
        "type(batches)._shutdown_workers = lambda self: None\n"
        "raise OSError('the disk is gone')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert "the disk is gone" in done.stderr
