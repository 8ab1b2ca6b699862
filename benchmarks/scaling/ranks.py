"""What many ranks draw, real ones and simulated ones."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import sampler_overhead as overhead
from benchmarks.scaling.parts import BATCH, LEVELS, SAMPLERS, draws
from benchmarks.scaling.rows import Row, growth
from diffusers_curriculum import Slots, TimestepSampler
from diffusers_curriculum.randomness import uniforms

REAL = 2


def measure_ranks(worlds: Sequence[int], repeats: int, blocks: int) -> tuple[Row, dict[str, bool]]:
    """The draw of one rank among so many, and whether all of them draw what one process draws, each
    number once."""
    times, agree, sampler = [], {}, SAMPLERS["laplace"](LEVELS)
    for world in worlds:
        call = draws(sampler, Slots.of(BATCH, world_size=world))
        times.append(round(overhead.paired(call, BATCH, LEVELS, repeats, blocks)[0], 2))
        slots = [Slots.of(BATCH, rank=rank, world_size=world) for rank in range(world)]
        drawn = _real(world) if world == REAL else [_drawn(sampler, own) for own in slots]
        together, whole = (
            torch.cat(drawn, 1),
            _drawn(sampler, Slots(0, BATCH * world, BATCH * world)),
        )
        unique = len(together[0].unique()) == BATCH * world
        agree[str(world)] = unique and torch.equal(together, whole)
    growths = growth(worlds, times), growth(worlds[-2:], times[-2:])
    row = Row("ranks", "draw, laplace", list(worlds), times, [0] * len(times), *growths, False)
    return row, agree


def _drawn(sampler: TimestepSampler, slots: Slots) -> Tensor:
    """(2, B) the uniform numbers of step 0 and the levels that they are put through to."""
    numbers = uniforms(sampler.draw, seed=sampler.seed, step=0, slots=slots)
    return torch.stack([numbers, sampler.sample(slots, step=0).indices.double()])


def _real(world: int) -> list[Tensor]:
    """What processes over gloo draw, that know their slots from torch.distributed."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, folder), nprocs=world)
        paths = (Path(folder) / f"{rank}.npy" for rank in range(world))
        return [torch.from_numpy(np.load(path)) for path in paths]


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    drawn = _drawn(SAMPLERS["laplace"](LEVELS), Slots.here(BATCH))
    np.save(Path(folder) / f"{rank}.npy", drawn.numpy())
    torch.distributed.destroy_process_group()
