"""What a draw and an observation cost on one CPU core, for every entry of the catalogues.

    python -m benchmarks.sampler_overhead [--batch 64] [--repeats 200] [--blocks 7] [--json PATH]
                                          [--check]

``sample(batch)`` and ``observe(indices, losses, step)`` are timed in turn with
``torch.randint(0, T, (batch,))``, the draw that diffusers' scripts make (A B A B ...): a block is
``repeats`` single calls of each, and figures are medians over the blocks of the medians of a block.
With ``--check`` the exit status is 1 if a figure exceeds 30 microseconds, or what MORE allows.

The entries are read from the registries. One that needs arguments takes them from its example; one
that cannot be built is listed as left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from diffusers_curriculum import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    TimestepSampler,
    densities,
)
from diffusers_curriculum.pacing import PACINGS
from diffusers_curriculum.randomness import DRAWS
from diffusers_curriculum.samplers import SAMPLERS

LIMIT = 30.0  # microseconds
# What more is done than one draw through a table that is kept, or one observation.
MORE: dict[str, float] = {
    "curriculum over auto": 60.0,  # two learn: the law and the pacing
    "sequence, mixed": 120.0,  # another law at every step, made of two
    "continuous, edm": 150.0,  # a place in the cell besides
    "continuous, flow": 200.0,
}
WARM_UP = 20

# Arguments of the samplers and pacings that have no defaults for all of theirs; densities bring
# examples of their own.
EXAMPLES: dict[str, dict[str, Any]] = {
    "SequenceTimestepSampler": {
        "phases": [
            {"until": 20, "sampler": {"density": "normal"}},
            {"until": None, "sampler": {"density": "uniform"}},
        ],
        "mix": "linear",
        "mix_steps": 10,
    },
    "MovingTimestepSampler": {"move_steps": 1000, "widen_steps": 1000},
}

_SCHEDULERS: dict[str, Any] = {
    "vp": lambda: diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
    "edm": diffusers.EDMEulerScheduler,
}


class Row(NamedTuple):
    """Medians in microseconds, and the ratios to ``torch.randint`` timed in turn."""

    name: str
    sample: float
    sample_ratio: float
    observe: float
    observe_ratio: float


def scheduler_for(density: str) -> Any:
    """A scheduler of the first family that a density is meant for."""
    families = densities.DENSITIES.entry(density).families
    return next(s for f, s in _SCHEDULERS.items() if families == "all" or f in families)()


def own_samplers() -> list[str]:
    """The classes of the samplers that the package itself brings, by name, but for those that are
    told more than a batch to draw."""
    own = [k for k in SAMPLERS.values() if k.__module__.startswith("diffusers_curriculum.")]
    return [kind.__name__ for kind in own if kind.sample is TimestepSampler.sample]


def build_density(name: str, scheduler: Any = None, **settings: Any) -> DensityTimestepSampler:
    """A density sampler with the density's example arguments."""
    args = dict(densities.DENSITIES.entry(name).example)
    scheduler = scheduler or scheduler_for(name)
    return DensityTimestepSampler(scheduler, density=name, density_args=args, **settings)


def build_sampler(name: str, scheduler: Any = None, **settings: Any) -> TimestepSampler:
    """A sampler with its example arguments, by default on a variance preserving schedule."""
    args = EXAMPLES.get(name, {}) | settings
    return TimestepSampler.kinds()[name].from_scheduler(scheduler or _SCHEDULERS["vp"](), **args)


def build_curriculum(pacing: str, base: str = "laplace", **settings: Any) -> TimestepSampler:
    """A curriculum of 20 clusters with the pacing's example arguments."""
    args = EXAMPLES.get(pacing, {})
    density = build_density(base, **settings)
    return CurriculumTimestepSampler(density, pacing=pacing, pacing_args=args)


def curriculum_over(name: str, scheduler: Any = None, **settings: Any) -> TimestepSampler:
    """A curriculum over the sampler that is registered as ``name``."""
    base = build_sampler(SAMPLERS.look_up(name).__name__, scheduler)
    return CurriculumTimestepSampler(base, **settings)


def cases() -> Iterator[tuple[str, Callable[[], TimestepSampler]]]:
    """(name, constructor) of everything that is measured."""
    for name in densities.DENSITIES:
        yield f"density {name}", lambda name=name: build_density(name)
    for name in DRAWS:
        yield f"draw {name}", lambda name=name: build_density("laplace", draw=name)
        yield (
            f"curriculum, draw {name}",
            lambda name=name: build_curriculum("patience", draw=name),
        )
    yield "correction full", lambda: build_density("laplace", importance_correction="full")
    for name in PACINGS:
        yield f"curriculum, pacing {name}", lambda name=name: build_curriculum(name)
    smooth = {"smoothing": 0.9, "max_stage_steps": 500}
    yield (
        "curriculum, patience smoothed",
        lambda: CurriculumTimestepSampler(build_density("laplace"), pacing_args=smooth),
    )
    for name in own_samplers():
        yield f"sampler {name}", lambda name=name: build_sampler(name)
    for name in ("auto", "moving"):
        yield f"curriculum over {name}", lambda name=name: curriculum_over(name)
    yield "sequence, mixed", lambda: build_sampler("SequenceTimestepSampler", mix_steps=10**9)
    for name, density in {"edm": "edm", "flow": "logit_normal"}.items():
        yield (
            f"continuous, {name}",
            lambda name=name, density=density: build_density(
                density, _SCHEDULERS[name](), continuous=True
            ),
        )


def measure(sampler: TimestepSampler, batch: int, repeats: int, blocks: int) -> tuple[float, ...]:
    """(sample, ratio, observe, ratio): medians over the blocks."""
    indices, losses, steps = sampler.sample(batch).indices, torch.rand(batch), count(1)
    calls = (lambda: sampler.sample(batch), lambda: sampler.observe(indices, losses, next(steps)))
    timed = (paired(call, batch, len(sampler.levels), repeats, blocks) for call in calls)
    return tuple(figure for pair in timed for figure in pair)


def paired(
    call: Callable[[], Any], batch: int, levels: int, repeats: int, blocks: int
) -> tuple[float, float]:
    """Microseconds of a call, and their ratio to the draw of diffusers' scripts, timed in turn."""
    baseline = lambda: torch.randint(0, levels, (batch,))  # noqa: E731
    _times(call, baseline, min(WARM_UP, repeats))
    timed = [_times(call, baseline, repeats) for _ in range(blocks)]
    pairs = [(ours, ours / theirs) for ours, theirs in timed]
    time_taken, ratio = (statistics.median(column) for column in zip(*pairs, strict=True))
    return time_taken, ratio


def _times(a: Callable[[], Any], b: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Medians of single calls of ``a`` and ``b`` in turn, in microseconds."""
    spent: tuple[list[int], list[int]] = [], []
    for _ in range(repeats):
        for call, times in zip((a, b), spent, strict=True):
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
    return statistics.median(spent[0]) / 1000, statistics.median(spent[1]) / 1000


def run(batch: int, repeats: int, blocks: int) -> tuple[list[Row], dict[str, str]]:
    """The rows, and the reasons of the entries that were left out."""
    rows, left_out = [], {}
    for name, build in cases():
        try:
            sampler = build()
        except (TypeError, ValueError) as error:
            left_out[name] = str(error)
            continue
        rows.append(Row(name, *measure(sampler, batch, repeats, blocks)))
    return rows, left_out


def table(rows: list[Row], left_out: dict[str, str]) -> str:
    """The rows as text."""
    lines = [f"{'':40}{'sample':>10}{'x randint':>11}{'observe':>10}{'x randint':>11}"]
    lines += [
        f"{r.name:40}{r.sample:7.1f} us{r.sample_ratio:11.1f}{r.observe:7.1f} us"
        f"{r.observe_ratio:11.1f}"
        for r in rows
    ]
    return "\n".join([*lines, *(f"left out: {name}: {why}" for name, why in left_out.items())])


def too_slow(rows: list[Row], limit: float = LIMIT) -> list[str]:
    """The names of the rows above ``limit`` microseconds, or what MORE allows."""
    return [r.name for r in rows if max(r.sample, r.observe) > MORE.get(r.name, limit)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampler_overhead")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=200, help="calls of each in a block")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--check", action="store_true", help=f"fail above {LIMIT:.0f} microseconds")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, left_out = run(args.batch, args.repeats, args.blocks)
    print(table(rows, left_out))
    if args.json:
        figures = {"batch": args.batch, "repeats": args.repeats, "blocks": args.blocks}
        figures |= {"rows": [row._asdict() for row in rows], "left_out": left_out}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    slow = too_slow(rows)
    if args.check and slow:
        print(f"above {LIMIT:.0f} microseconds: {', '.join(slow)}")
    return int(args.check and bool(slow))


if __name__ == "__main__":
    sys.exit(main())
