"""All cells of a tier: those that are missing, in parallel, the longest first."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from benchmarks.evidence.cells import Cell, config
from benchmarks.evidence.data import pictures
from benchmarks.evidence.large import forward_flops
from benchmarks.evidence.network import flops
from benchmarks.evidence.sampling import CHUNK


class Speed(NamedTuple):
    """What the estimate reckons with.

    Attributes:
        training, sampling: floating point operations in a second.
        seed_step: seconds of a seed's step besides the matrices: draws, noise, the optimizer.
        launches: seconds of a way forward of a network of diffusers, however few its samples.
        checkpoint: seconds for a seed: distances.
    """

    training: float
    sampling: float
    seed_step: float
    launches: float
    checkpoint: float


# Of one core of the machine of RESULTS.md; of a large GPU guessed, as no run on one was made yet.
SPEEDS = {"cpu": Speed(7e10, 9e10, 6e-4, 0.0, 0.25), "cuda": Speed(1e14, 1e14, 1e-3, 5e-3, 0.3)}


class Failed(RuntimeError):
    """Cells that ended with an error; the others are done."""


def seconds_of(cell: Cell, device: str = "cpu") -> float:
    """Seconds of a core or a GPU for a cell, as far as one knows before."""
    told, s, speed = config("tasks", cell.task), cell.settings, SPEEDS[device]
    size = told["dimensions"] if "dimensions" in told else pictures(told["data"]).rows.shape[1]
    cost, launches, points = flops(s, size), 0.0, len(cell.checkpoints())
    if "network" in told:
        cost, launches = forward_flops(told["network"], size), speed.launches
    training = s["steps"] * (speed.seed_step + 3 * (launches + cost * s["batch"] / speed.training))
    rounds = points * s["sampling_steps"][0]
    rounds += sum(s["sampling_steps"][1:]) + 2 * s["sampling_steps"][0] * len(s["guidance"][1:])
    if told["kind"] == "fine_tuning":
        rounds *= 1.5
    sampling = rounds * (launches * s["samples"] / CHUNK + s["samples"] * cost / speed.sampling)
    return s["seeds"] * (training + sampling + points * speed.checkpoint)


def missing(cells: Sequence[Cell], output_dir: Path, device: str = "cpu") -> list[Cell]:
    """Cells without a result, the longest first."""
    left = [cell for cell in cells if not (output_dir / cell.file()).is_file()]
    return sorted(left, key=lambda cell: seconds_of(cell, device), reverse=True)


def run(cells: Sequence[Cell], output_dir: Path, processes: int, device: str = "cpu") -> None:
    """Measure the cells on a device and write each result as soon as it is there.

    Raises:
        Failed: cells that ended with an error, each named with it.
    """
    faults: list[str] = []
    total = round(sum(seconds_of(cell, device) for cell in cells))
    done = _inline if processes == 1 else _pooled
    with tqdm(total=total, unit="s", desc=f"{device} seconds", smoothing=0.05) as bar:
        for cell, fault in done(cells, output_dir, processes, device):
            bar.update(round(seconds_of(cell, device)))
            if fault:
                faults.append(f"{cell.name}: {fault}")
                bar.write(faults[-1])
    if faults:
        raise Failed(f"{len(faults)} of {len(cells)} cells failed: " + "; ".join(faults))


Done = Iterator[tuple[Cell, str]]


def _inline(cells: Sequence[Cell], output_dir: Path, processes: int, device: str) -> Done:
    for cell in cells:
        yield cell, _attempt(lambda cell=cell: make(cell, output_dir, device))


def _attempt(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _pooled(cells: Sequence[Cell], output_dir: Path, processes: int, device: str) -> Done:
    """What several cells need is made first, once."""
    with ProcessPoolExecutor(processes, get_context("spawn"), start_worker) as pool:
        try:
            shared = [pool.submit(make_shared, cell, output_dir) for cell in with_shared(cells)]
            for future in shared:
                future.exception()  # told by the cells that need it
            waiting = {pool.submit(make, cell, output_dir, device): cell for cell in cells}
            while waiting:
                ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield waiting.pop(future), _attempt(_result(future))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[Any]) -> Callable[[], Any]:
    return future.result


def start_worker() -> None:
    """What a process of the pool starts with; it ends with the one that started it, however that
    one ends."""
    one_thread()
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def one_thread() -> None:
    """What a process that measures on a core starts with."""
    torch.set_num_threads(1)
    quiet()


def quiet() -> None:
    """A law without a floor is told of in the logs of the library for each seed; here it is what
    the method's file says."""
    logging.getLogger("diffusers_curriculum").setLevel(logging.ERROR)


def with_shared(cells: Sequence[Cell]) -> list[Cell]:
    """One cell of each kind that shares something: a judge, a network to start from."""
    kinds: dict[Any, Cell] = {}
    for cell in cells:
        told = config("tasks", cell.task)
        if told["kind"] == "fine_tuning":
            kinds.setdefault((told["data"], cell.target, cell.settings["steps"]), cell)
        elif told["kind"] == "images":
            kinds.setdefault(told["data"], cell)
    return [*kinds.values()]


def make_shared(cell: Cell, output_dir: Path) -> None:
    """Leave in the cache what the cell shares with others."""
    from benchmarks.evidence.judge import judge_of
    from benchmarks.evidence.measuring import prepare

    judge_of(config("tasks", cell.task)["data"], cache_of(output_dir))
    prepare(cell, cache_of(output_dir))


def make(cell: Cell, output_dir: Path, device: str = "cpu") -> Path:
    """Measure a cell and write its result."""
    from benchmarks.evidence.measuring import measure, write

    file = output_dir / cell.file()
    write(file, measure(cell, cache_of(output_dir), device))
    return file


def cache_of(output_dir: Path) -> Path:
    """Where networks are kept that several cells share."""
    return output_dir / "cache"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
