"""A trace of a few steps, by torch's profiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

WARM_UP = 10  # steps before the first that is traced: kernels are chosen, caches filled
TRACE, TABLE = "trace.json", "operators.txt"
_ROWS = 50  # of the table


def check_traced(steps: int | None, length: int) -> None:
    """Refuse a run of ``length`` steps that is too short for those to be traced.

    Raises:
        UsageError: how many there may be.
    """
    if steps is not None and length < WARM_UP + steps:
        raise UsageError(
            f"--profile_steps is {steps}, and this run makes {length}: {WARM_UP} are left out "
            f"before, so give at most {max(length - WARM_UP, 0)}, or more --max_train_steps."
        )


@contextmanager
def profiled(steps: int | None, length: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Trace ``steps`` of the ``length`` steps of a run, from the one after :data:`WARM_UP` on, and
    write them into a folder: trace.json for chrome://tracing or perfetto.dev, and operators.txt.

    Args:
        steps: None traces nothing.

    Yields:
        What is called after each step.

    Raises:
        UsageError: as :func:`check_traced`.
    """
    check_traced(steps, length)
    if steps is None:
        yield lambda: None
        return
    import torch

    plan = torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)

    def write(profiler: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=_ROWS)
        (folder / TABLE).write_text(table + "\n", "utf-8")
        logger.info("a trace of %d steps in %s", steps, folder)

    with torch.profiler.profile(schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
