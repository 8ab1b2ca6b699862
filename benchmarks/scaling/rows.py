"""A part's figures: times, memory, and how they grow."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from benchmarks import sampler_overhead as overhead
from benchmarks.scaling.parts import BATCH, LEVELS, Part

CONSTANT = 0.1


class Row(NamedTuple):
    """A part's figures at each of its sizes; memory in bytes."""

    axis: str
    name: str
    sizes: list[int]
    microseconds: list[float]
    memory: list[int]
    growth: float
    at_the_end: float
    must_be_constant: bool


def measure(part: Part, sizes: Sequence[int], repeats: int, blocks: int) -> Row:
    """The figures of one part."""
    times, memory = [], []
    for size in sizes:
        call, kept = _kept(lambda size=size: part.build(size))
        each = 1 if part.heavy else repeats
        times.append(round(overhead.paired(call, BATCH, LEVELS, each, blocks)[0], 2))
        memory.append(kept)
    own = (part.axis, part.name, list(sizes), times, memory)
    return Row(*own, growth(sizes, times), growth(sizes[-2:], times[-2:]), part.must_be_constant)


def growth(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The exponent b of time = a size^b, by least squares of logarithms; 0 of a single size."""
    if len(sizes) < 2:
        return 0.0
    return round(float(np.polyfit(np.log(sizes), np.log(times), 1)[0]), 3)


def _kept(build: Callable[[], Any]) -> tuple[Any, int]:
    """What is built, called once, and the bytes of torch's and numpy's arrays that stay."""
    gc.freeze()  # what is there already is not looked at
    tracemalloc.start()
    try:
        made = build()
        made()
        gc.collect()
        own = tracemalloc.get_traced_memory()[0]  # numpy tells of its arrays
    finally:
        tracemalloc.stop()
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
    gc.unfreeze()
    return made, own + sum({s.data_ptr(): s.nbytes() for s in storages}.values())
