"""Operations of a step, counted, beside the fastest matrix product that the device does."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import clock
from benchmarks.gpu.settings import Settings

SIDE, REPEATS, WINDOWS = 8192, 20, 5


def counted(work: Callable[[], object]) -> int:
    """Floating-point operations of what ``work`` does: of matrix products, convolutions and
    PyTorch's own attention, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_peak(settings: Settings) -> float:
    """Operations per second of bf16 products of square matrices: the median of some windows."""
    side = 64 if settings.smoke else SIDE
    a, b = (torch.randn(side, side, device=settings.device).bfloat16() for _ in range(2))
    operations = counted(lambda: a @ b)
    work = lambda: [a @ b for _ in range(REPEATS)]  # noqa: E731
    work()
    times = [clock.seconds(settings.device, work) for _ in range(WINDOWS)]
    return REPEATS * operations / statistics.median(times)


def share(images_per_second: float, per_image: float, peak: float) -> dict[str, Any]:
    """Operations per second, and their share of ``peak``."""
    rate = images_per_second * per_image
    return {
        "teraflops_per_image": round(per_image / 1e12, 6),
        "teraflops_per_second": round(rate / 1e12, 3),
        "share_of_matrix_peak": round(rate / peak, 4),
    }
