"""Timing of paired variants on a device whose work is queued."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Step = Callable[[], object]


def seconds(device: torch.device, work: Step) -> float:
    """Wall time of ``work``, from an idle device to an idle device."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has done all that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paired_windows(
    device: torch.device, variants: Mapping[str, Step], images: int, windows: int, length: float
) -> dict[str, Any]:
    """Images per second of each variant, measured in turn: A B A B ...

    A drift of clocks or temperature then meets all variants alike.

    Args:
        variants: one optimizer step each.
        images: images per step.
        windows: windows per variant.
        length: seconds that a window should last; it has one step at least.

    Returns:
        for each variant ``images_per_second`` (median), ``windows`` (all of them) and
        ``peak_memory_gib``; ``steps_per_window``; and with two variants ``ratio``, the second's
        median over the first's, with the ratio of each pair.
    """
    for step in variants.values():  # libraries choose kernels, caches fill
        step()
        step()
    slowest = max(seconds(device, step) for step in variants.values())
    steps = max(1, min(50, round(length / max(slowest, 1e-6)))) if length else 1
    rates: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, float] = dict.fromkeys(variants, 0.0)
    for _ in range(windows):
        for name, step in variants.items():
            _reset_peak(device)
            taken = seconds(device, lambda step=step: [step() for _ in range(steps)])
            rates[name].append(round(steps * images / taken, 3))
            peaks[name] = max(peaks[name], _peak_gib(device))
    return {"steps_per_window": steps, **_table(device, rates, peaks), **_ratio(rates)}


def _table(
    device: torch.device, rates: Mapping[str, list[float]], peaks: Mapping[str, float]
) -> dict[str, Any]:
    return {
        name: {
            "images_per_second": statistics.median(values),
            "windows": values,
            "peak_memory_gib": round(peaks[name], 2) if device.type == "cuda" else None,
        }
        for name, values in rates.items()
    }


def _ratio(rates: Mapping[str, list[float]]) -> dict[str, Any]:
    if len(rates) != 2:
        return {}
    first, second = rates.values()
    pairs = [round(b / a, 4) for a, b in zip(first, second, strict=True)]
    middle = round(statistics.median(second) / statistics.median(first), 4)
    return {"ratio": middle, "ratio_of_pairs": pairs}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
