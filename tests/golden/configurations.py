"""One sampler for each entry of the catalogues, with losses to learn from, and their draws."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.sampler_overhead import EXAMPLES, build_density, build_sampler, own_samplers
from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.pacing import PACINGS
from diffusers_curriculum.randomness import DRAWS
from diffusers_curriculum.samplers.stages import ORDERS, WITHIN
from tests.floors_fixtures import SCHEDULERS

SEED, STEPS, BATCH, SHOWN = 20260101, 50, 20, 20

# Stages must change within the steps above.
PACING_ARGS: dict[str, dict[str, Any]] = {
    "patience": {"patience": 2},
    "fixed": {"stage_steps": 7},
    "linear": {"total_steps": 40},
    "cosine": {"total_steps": 40},
    "root": {"total_steps": 40},
}
_OF_THE_CLOCK = ("logit_normal", "mode", "cosmap")  # they move with a shift of the schedule
SMOOTH = {"patience": 2, "smoothing": 0.6, "min_delta": 0.001, "max_stage_steps": 9}
LATE = {"stage_steps": 25}
# so that the samplers that learn a law do so within the steps above
LEARN_SOON = {"warm_up": 6, "refresh_every": 4, "min_observations": 1, "bins": 8}
MOVE_SOON = {"move_steps": 30, "widen_steps": 15}

MOVE_IN_STAGES = {"move_steps": None, "pacing": "patience", "pacing_args": {"patience": 2}}


class Draws(NamedTuple):
    """What is kept of 1,000 draws: the digest of all indices (int64, little-endian), and a few."""

    sha256: str
    first: list[int]


class Case(NamedTuple):
    """A sampler, and the step whose losses are nan, if one is."""

    build: Callable[[], TimestepSampler]
    broken_step: int | None = None


def configurations() -> dict[str, Case]:
    """Every configuration by its name in the golden file; what the catalogues gain appears here."""
    found = {f"density/{n}": Case(lambda n=n: build_density(n, seed=SEED)) for n in DENSITIES}
    found |= {f"schedule/{n}": Case(lambda n=n: _base(SCHEDULERS[n]())) for n in SCHEDULERS}
    found |= {f"draw/{n}": Case(lambda n=n: _base(draw=n)) for n in DRAWS}
    found |= {f"pacing/{n}": Case(lambda n=n: _paced(n)) for n in PACINGS}
    found |= {f"order/{n}": Case(lambda n=n: _curriculum(order=n)) for n in ORDERS}
    found |= {f"within/{n}": Case(lambda n=n: _curriculum(within=n)) for n in WITHIN}
    return found | _compositions() | {f"sampler/{n}": _sampler_case(n) for n in own_samplers()}


def _sampler_case(name: str) -> Case:
    takes = inspect.signature(TimestepSampler.kinds()[name]).parameters
    soon = {key: value for key, value in (LEARN_SOON | MOVE_SOON).items() if key in takes}
    return Case(lambda: build_sampler(name, **soon))


def _compositions() -> dict[str, Case]:
    return {
        "floor/none": Case(lambda: _base(floor=0.0)),
        "correction/full": Case(lambda: _base(importance_correction="full", floor=0.3)),
        "correction/half": Case(lambda: _base(importance_correction=0.5, floor=0.05)),
        "pacing/patience, smoothed": Case(lambda: _curriculum(pacing_args=SMOOTH)),
        "pacing/patience, a loss of nan": Case(_curriculum, broken_step=3),
        "curriculum/quantile, corrected": Case(
            lambda: _curriculum(
                _base(importance_correction="full", draw="sobol"), clustering="quantile"
            )
        ),
        "curriculum/of a curriculum": Case(
            lambda: _curriculum(_paced("fixed"), clusters=2, pacing="fixed", pacing_args=LATE)
        ),
        **{f"shifted/{name}": Case(lambda name=name: _shifted(name)) for name in _OF_THE_CLOCK},
        "moving/patience": Case(lambda: build_sampler("MovingTimestepSampler", **MOVE_IN_STAGES)),
        "curriculum/flow": Case(lambda: _curriculum(_base(SCHEDULERS["flow"]()))),
    }


def draw(case: Case) -> Draws:
    """The first 1,000 draws, each step's losses observed before the next."""
    sampler, drawn = case.build(), []
    for step in range(STEPS):
        indices = sampler.sample(BATCH).indices
        factor = torch.nan if step == case.broken_step else 1.0
        sampler.observe(indices, losses(indices, step) * factor, step)
        drawn += indices.tolist()
    content = torch.tensor(drawn, dtype=torch.int64).numpy().astype("<i8").tobytes()
    return Draws(hashlib.sha256(content).hexdigest(), drawn[:SHOWN])


def losses(indices: Tensor, step: int) -> Tensor:
    """(N,) float32 losses that look like chance and are the same everywhere: no transcendental
    function, whose last digit depends on the machine."""
    return ((indices * 7919 + step * 104729 + 12345) % 1009).float() / 1024


def _base(scheduler: Any = None, **settings: Any) -> DensityTimestepSampler:
    return DensityTimestepSampler(scheduler or SCHEDULERS["sd"](), **settings, seed=SEED)


def _shifted(density: str) -> DensityTimestepSampler:
    return _base(SCHEDULERS["flow_shift_3"](), density=density)


def _paced(name: str) -> CurriculumTimestepSampler:
    args = PACING_ARGS.get(name, EXAMPLES.get(name, {}))
    return _curriculum(pacing=name, pacing_args=args)


def _curriculum(base: TimestepSampler | None = None, **settings: Any) -> CurriculumTimestepSampler:
    defaults: dict[str, Any] = {"clusters": 5, "pacing_args": PACING_ARGS["patience"]}
    return CurriculumTimestepSampler(base or _base(), **(defaults | settings))
