"""What is timed, and at which sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from benchmarks import sampler_overhead as overhead
from diffusers_curriculum import CurriculumTimestepSampler, Slots, TimestepSampler
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.randomness import gaussian
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.weighting import loss_weights

BATCH, LEVELS = 64, 1000
SIZES: dict[str, tuple[int, ...]] = {
    "batch": (1, 4, 16, 64, 256, 1024, 4096),
    "resolution": (64, 128, 256, 512, 1024),
    "timesteps": (10, 100, 1000, 10_000, 100_000),
    "clusters": (2, 5, 20, 100, 250),
    "rows": (1000, 10_000, 100_000, 1_000_000, 10_000_000),
    "ranks": (1, 2, 1024),
}
Build = Callable[[int], Callable[[], Any]]


class Part(NamedTuple):
    """Something that is timed at each size of an axis.

    Attributes:
        build: from a size to the call that is timed.
        must_be_constant: whether a growth fails the check.
        heavy: seconds rather than microseconds: it is called once a block.
    """

    axis: str
    name: str
    build: Build
    must_be_constant: bool = False
    heavy: bool = False


def scheduler(levels: int) -> diffusers.DDPMScheduler:
    """Stable Diffusion's noise schedule in ``levels`` steps, with about its last level."""
    share = min(1.0, LEVELS / levels)
    return diffusers.DDPMScheduler(
        levels, beta_schedule="scaled_linear", beta_start=0.00085 * share, beta_end=0.012 * share
    )


SAMPLERS: dict[str, Callable[[int], TimestepSampler]] = {
    "laplace": lambda t: overhead.build_density("laplace", scheduler(t)),
    "laplace, corrected": lambda t: overhead.build_density(
        "laplace", scheduler(t), importance_correction="full"
    ),
    "moving": lambda t: overhead.build_sampler("MovingTimestepSampler", scheduler(t)),
    "auto": lambda t: overhead.build_sampler("AutoTimestepSampler", scheduler(t)),
    "loss_second_moment": lambda t: overhead.build_sampler(
        "LossSecondMomentTimestepSampler", scheduler(t)
    ),
    "curriculum": lambda t: curriculum(t, 3),
    "curriculum over auto": lambda t: overhead.curriculum_over("auto", scheduler(t), clusters=3),
}


def curriculum(levels: int, clusters: int) -> TimestepSampler:
    """A curriculum over uniform draws, whose every cluster has levels."""
    return CurriculumTimestepSampler.from_scheduler(
        scheduler(levels), clusters=clusters, clustering="uniform"
    )


def draws(sampler: TimestepSampler, batch: int | Slots = BATCH) -> Callable[[], Any]:
    """One draw of each step."""
    steps = count()
    return lambda: sampler.sample(batch, step=next(steps))


def observes(sampler: TimestepSampler, batch: int = BATCH) -> Callable[[], Any]:
    """One observation of each step."""
    steps, indices, losses = count(1), sampler.sample(batch, step=0).indices, torch.rand(batch)
    return lambda: sampler.observe(indices, losses, next(steps))


def learns(sampler: TimestepSampler) -> Callable[[], Any]:
    """As many draws and observations as a law that learns makes between two refreshes, and one."""
    draw, observe = draws(sampler), observes(sampler)

    def window() -> None:
        for _ in range(sampler.config["refresh_every"]):
            draw()
            observe()

    return window


def weighs(levels: int) -> Callable[[], Any]:
    """The loss weights of a batch: their table is made once."""
    table = loss_weights("min_snr", NoiseLevels.from_scheduler(scheduler(levels)))
    indices = torch.randint(levels, (BATCH,), generator=torch.Generator().manual_seed(0))
    return lambda: table[indices] if table is not None else None


def noise(resolution: int) -> Callable[[], Tensor]:
    """The noise of four latents."""
    shape, steps = (4, resolution // 8, resolution // 8), count()
    slots = Slots(0, 4, 4)
    return lambda: gaussian(shape, seed=0, step=next(steps), slots=slots, purpose="noise")


def plan(rows: int, seed: int = 0) -> BatchPlan:
    """The order of a data set for one process."""
    return BatchPlan(rows, BATCH, accumulation=1, world_size=1, rank=0, seed=seed)


def reads_rows(rows: int, sampler: TimestepSampler | None = None) -> Callable[[], Any]:
    """Which rows a batch holds, and its noise levels with ``sampler``."""
    order, steps = plan(rows), count()
    last = max(1, rows // BATCH)  # steps of one epoch: the next one's order is a row of its own

    def batch() -> None:
        step = next(steps) % last
        _ = [order.index(position) for position in order.positions(step, 0)]
        if sampler is not None:
            sampler.sample(BATCH, step=step)

    batch()
    return batch


def orders(rows: int) -> Callable[[], Any]:
    """The order of one epoch."""
    seeds = count()
    return lambda: plan(rows, next(seeds)).index(0)


def parts() -> Iterator[Part]:
    """Everything that is timed."""
    flat = SAMPLERS["laplace"]
    yield Part("batch", "draw, curriculum", lambda n: draws(curriculum(LEVELS, 20), n))
    yield Part("batch", "observe, curriculum", lambda n: observes(curriculum(LEVELS, 20), n))
    yield Part("batch", "observe, auto", lambda n: observes(SAMPLERS["auto"](LEVELS), n))
    yield Part("resolution", "noise of 4 latents", noise)
    yield Part("resolution", "draw, laplace", lambda n: draws(flat(LEVELS)))
    for name, build in SAMPLERS.items():
        yield Part("timesteps", f"draw, {name}", lambda n, b=build: draws(b(n)), True)
        if name in ("laplace", "laplace, corrected", "moving"):  # which learn nothing
            continue
        yield Part("timesteps", f"observe, {name}", lambda n, b=build: observes(b(n)), True)
    for name in ("auto", "loss_second_moment"):
        build = SAMPLERS[name]
        every = build(LEVELS).config["refresh_every"]
        part = f"{every} steps and a refresh, {name}"
        yield Part("timesteps", part, lambda n, b=build: learns(b(n)), heavy=True)
    yield Part("timesteps", "loss weights", weighs, True)
    yield Part("clusters", "draw, curriculum", lambda n: draws(curriculum(LEVELS, n)))
    yield Part("clusters", "observe, curriculum", lambda n: observes(curriculum(LEVELS, n)))
    yield Part("rows", "order of one epoch", orders, heavy=True)
    yield Part("rows", "rows of a batch", reads_rows, True)
    yield Part("rows", "rows of a batch and its draw", lambda n: reads_rows(n, flat(LEVELS)), True)
