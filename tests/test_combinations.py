"""Everything with everything: each combination works, or is refused at construction with a reason.

Schedule x sampler x draw x floor x importance correction x loss weighting x prediction type, drawn
at random, in four walks of equal length: densities, samplers that learn, curricula and sequences of
any of them.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_curriculum import Objective
from diffusers_curriculum.clustering import CLUSTERINGS
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.pacing import PACINGS
from diffusers_curriculum.randomness import DRAWS
from diffusers_curriculum.samplers import (
    SAMPLERS,
    AdaptiveTimestepSampler,
    CurriculumTimestepSampler,
    SequenceTimestepSampler,
    TimestepSampler,
    gradient_norm_samplers,
)
from diffusers_curriculum.samplers.stages import ORDERS, WITHIN
from diffusers_curriculum.weighting import MEASURES, TARGETS, WEIGHTINGS, loss_weights
from tests.floors_fixtures import SCHEDULERS
from tests.samplers.draws import parts

BATCH, LEARNED, LATE = 24, 8, 60
OBSERVED = range(LEARNED)
Strategy = st.SearchStrategy[Any]
Settings = dict[str, Any]


# -- what there is to combine ----------------------------------------------------------------------


def number(low: float, high: float) -> Strategy:
    return st.integers(0, 64).map(lambda n: low + (high - low) * n / 64)


def some_of(**strategies: Strategy) -> Strategy:
    return st.fixed_dictionaries({}, optional=strategies)


def shifted(**strategies: Strategy) -> Strategy:
    """Parameters of a law of flow matching, and what its shift is; seldom said twice."""
    shifts = [{}, {"shift": 3.0}, {"tokens": 1024}, {"pixels": 512**2, "base_pixels": 256**2}]
    shifts = [*shifts, {"shift": 0.5}, {"shift": 3.0, "tokens": 256}]
    both = st.tuples(some_of(**strategies), st.sampled_from(shifts))
    return both.map(lambda two: two[0] | two[1])


WIDTH, CENTRE = number(0.3, 4), number(-6, 6)
# parameters of each density, now and then too far or too narrow for the schedule
PARAMETERS: dict[str, Strategy] = {
    "laplace": some_of(mu=CENTRE, b=WIDTH),
    "cauchy": some_of(mu=CENTRE, gamma=WIDTH),
    "cosine_shifted": some_of(mu=CENTRE),
    "cosine_scaled": some_of(s=WIDTH),
    "normal": some_of(mean=CENTRE, std=WIDTH),
    "logistic": some_of(mu=CENTRE, s=WIDTH),
    "split_normal": some_of(mu=CENTRE, std_noisy=WIDTH, std_clean=WIDTH),
    "log_snr_uniform": some_of(low=number(-8, -1), high=number(-2, 8)),
    "logit_normal": shifted(mean=number(-2, 2), std=WIDTH),
    "flow_uniform": shifted(),
    "cosmap": shifted(),
    "mode": shifted(scale=number(-1, 1.75)),
    "heavy_tail": some_of(scale=number(-1, 1.75)),
    "edm": some_of(p_mean=number(-3, 3), p_std=WIDTH),
    "edm2": some_of(p_mean=number(-3, 3), p_std=WIDTH),
    "style_friendly": some_of(mean=number(-9, 0), std=WIDTH),
    "qinglong": st.fixed_dictionaries(
        {"tokens": st.sampled_from([256, 1024])},
        optional={"preset": st.sampled_from(["flux", "ltx-2", "sd3"]), "style": number(0, 1)},
    ),
    "shifted": st.tuples(
        st.sampled_from(["laplace", "mode", "uniform", "mixflow"]),
        st.sampled_from([{"shift": 3.0}, {"preset": "sd3"}, {"dimensions": 16384}, {"shift": 0.2}]),
        some_of(terminal=number(0, 0.5)),
    ).map(lambda three: {"density": three[0], **three[1], **three[2]}),
    "u_shaped": some_of(a=number(0.5, 8)),
    "beta": some_of(alpha=number(0.5, 4), beta=number(0.5, 4)),
    "speed": some_of(tau=st.sampled_from([0.3, 0.7, 20, 45.5, 150]), k=number(0.5, 9)),
    "timestep_bias": st.one_of(
        some_of(
            strategy=st.sampled_from(["earlier", "later"]),
            multiplier=number(0.1, 6),
            portion=number(0, 1),
        ),
        some_of(begin=st.integers(0, 30), end=st.integers(25, 60)).map(
            lambda args: {"strategy": "range", "multiplier": 3.0, **args}
        ),
    ),
    "scheme_logit_normal": some_of(mean=number(-3, 3), std=WIDTH),
    "scheme_mode": some_of(scale=number(-1, 1.7)),
    "grid": st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True).map(
        lambda timesteps: {"timesteps": timesteps}
    ),
    "truncated": st.one_of(
        st.fixed_dictionaries({"low": number(-8, 0)}, optional={"high": number(-2, 8)}),
        st.fixed_dictionaries(
            {"min_timestep": st.integers(0, 40)}, optional={"max_timestep": st.integers(20, 120)}
        ),
    ).map(lambda limits: {"density": "normal", **limits}),
}


def points() -> Strategy:
    """Log-SNRs and densities of three to six points, some of them 0."""
    levels = st.lists(st.integers(-12, 12), min_size=3, max_size=6, unique=True).map(sorted)
    heights = st.lists(number(0, 1), min_size=6, max_size=6)
    return st.tuples(levels, heights).map(lambda p: list(zip(p[0], p[1], strict=False)))


@st.composite
def densities(draw: st.DrawFn, names: tuple[str, ...] = tuple(DENSITIES)) -> tuple[str, Settings]:
    """A density and its parameters: those of its example, or others."""
    name = draw(st.sampled_from(names))
    if draw(st.integers(0, 2)) == 0:
        return name, DENSITIES.entry(name).example
    if name == "spline":
        return name, {"points": [[float(x), y] for x, y in draw(points())]}
    if name == "tabulated":
        x, y = zip(*draw(points()), strict=True)
        return name, {"log_snr": [float(v) for v in x], "density": list(y)}
    if name == "mixture":
        simple = tuple(sorted(PARAMETERS.keys() - {"truncated", "shifted"}))
        parts = draw(st.lists(densities(names=simple), min_size=1, max_size=3))
        weighed = [{"density": n, "weight": draw(number(0.1, 2)), **args} for n, args in parts]
        return name, {"components": weighed}
    return name, draw(PARAMETERS.get(name, st.just({})))


def shared_settings(walk: str) -> Strategy:
    """What every sampler takes."""
    least = [] if walk == "learning" else [0.0]
    return st.fixed_dictionaries(
        {
            "draw": st.sampled_from(sorted(DRAWS)),
            "floor": st.sampled_from([0.1, 0.02, 0.3, 0.5, 0.1, 1e-3, 1.0, *least]),
            "importance_correction": st.sampled_from(["full", "none", 0.5, 0.25]),
            "seed": st.integers(0, 2**31),
        }
    )


def own(kind: type) -> tuple[str, ...]:
    """The package's samplers of a kind."""
    package = "diffusers_curriculum."
    kinds = [k for k in SAMPLERS.values() if issubclass(k, kind)]
    return tuple(sorted(k.__name__ for k in kinds if k.__module__.startswith(package)))


LEARNING = own(AdaptiveTimestepSampler)
PACE_OF_LEARNING = {
    "bins": st.sampled_from([None, 1, 4, 5, 8, 10, 20, 50]),  # as many as the shortest schedule
    "refresh_every": st.sampled_from([1, 2, 3, 100]),
    "warm_up": st.sampled_from([0, 2, 5, 30]),
    "min_observations": st.sampled_from([1, 2, 3]),
}
ADAPTIVE = {
    "binning": st.sampled_from(["quantile", "log_snr_width"]),
    "ema": st.sampled_from([0.0, 0.5, 0.9]),
    "neighbours": st.integers(0, 2),
    "loss_weighting": st.sampled_from(["none", "min_snr", "sigmoid", "soft_min_snr", "unit_v"]),
    "measure": st.sampled_from(MEASURES),
    "mode": st.sampled_from(["gradients", "loss"]),
    "gate": st.sampled_from([None, 0, 0.5]),
}


class Given(NamedTuple):
    """What was drawn before a sampler.

    Attributes:
        shared: settings of every sampler.
        targets: prediction types of the schedule.
    """

    shared: Settings
    targets: list[str]

    def kinds(self, depth: int) -> tuple[str, ...]:
        """What a sampler may be made of; a law that learns refuses a floor of 0."""
        learning = ("learning",) if self.shared["floor"] else ()
        return ("density", *learning, *(NESTED if depth < 2 else ()))


MOVABLE = tuple(name for name, kind in DENSITIES.items() if kind.placement)


@st.composite
def moves(draw: st.DrawFn) -> Settings:
    """A law with a location, and its way; now and then one that it does not have."""
    pacing = draw(st.sampled_from(sorted(PACINGS)))
    by_stages = pacing in STEPS
    own = {
        "density": draw(st.sampled_from([*MOVABLE, *MOVABLE, "mode", "beta"])),
        "pacing": pacing,
        "pacing_args": draw(STEPS[pacing]) if by_stages else {},
        "move_steps": None if by_stages else draw(st.integers(1, 90)),
    }
    ways = {
        "location_start": CENTRE,
        "location_end": CENTRE,
        "scale_start": WIDTH,
        "widen_steps": st.integers(0, 40),
        "positions": st.integers(2, 12),
        "data_std": WIDTH,
    }
    return own | draw(some_of(**ways))


@st.composite
def samplers(draw: st.DrawFn, walk: str, given: Given, depth: int = 0) -> Settings:
    """The config of a sampler without its scheduler."""
    kinds = given.kinds(depth)
    inner = draw(st.sampled_from(kinds))
    if walk == "density" and draw(st.integers(0, 3)) == 0:
        return {"_class_name": "MovingTimestepSampler", **draw(moves()), **given.shared}
    if walk == "density":
        name, args = draw(densities())
        chosen = {"density": name, "density_args": args, **given.shared}
        chosen["outer_edges"] = draw(st.sampled_from(["half", "clip", "inf"]))
        return {"_class_name": "DensityTimestepSampler", **chosen}
    if walk == "learning":
        name, (density, args) = draw(st.sampled_from(LEARNING)), draw(densities())
        takes = inspect.signature(TimestepSampler.kinds()[name]).parameters
        options = ADAPTIVE | {"prediction_type": st.sampled_from(given.targets)}
        more = draw(some_of(**{k: v for k, v in options.items() if k in takes}))
        warm = {"warm_up_density": density, "warm_up_density_args": args}
        pace = draw(st.fixed_dictionaries(PACE_OF_LEARNING))
        return {"_class_name": name, **warm, **pace, **more, **given.shared}
    if walk == "curriculum":
        base = draw(samplers(inner, given, depth + 1))
        return {"_class_name": "CurriculumTimestepSampler", "base": base, **draw(paces())}
    ends = draw(st.lists(st.integers(1, 70), min_size=0, max_size=2, unique=True).map(sorted))
    phases = [
        {"until": end, "sampler": draw(samplers(draw(st.sampled_from(kinds)), given, depth + 1))}
        for end in [*ends, None]
    ]
    mixes = [{}, {"mix": "linear", "mix_steps": draw(st.integers(1, 5))}]
    mix = draw(st.sampled_from(mixes))
    return {"_class_name": "SequenceTimestepSampler", "phases": phases, **mix}


NESTED = ("curriculum", "sequence")
STEPS = {
    "patience": some_of(
        patience=st.integers(1, 4), smoothing=st.sampled_from([0.0, 0.6]), min_delta=number(0, 0.2)
    ),
    "fixed": st.fixed_dictionaries({"stage_steps": st.integers(1, 20)}),
}
TOTAL = st.fixed_dictionaries({"total_steps": st.integers(1, 90)})


@st.composite
def paces(draw: st.DrawFn) -> Settings:
    """The settings of a curriculum besides its base."""
    pacing, clusters = draw(st.sampled_from(sorted(PACINGS))), draw(st.integers(1, 8))
    clustering = draw(st.sampled_from(["auto", *CLUSTERINGS]))
    args: Settings = {}
    if clustering == "explicit":
        args = {"boundaries": [0, *sorted(draw(st.sets(st.integers(1, 55), max_size=4)))]}
    elif clustering in ("log_snr", "snr"):
        args = draw(some_of(center=st.sampled_from(["median", "ant"]), min_size=st.integers(1, 4)))
    return {
        "clusters": clusters,
        "clustering": clustering,
        "clustering_args": args,
        "pacing": pacing,
        "pacing_args": draw(STEPS.get(pacing, TOTAL)),
        "order": draw(st.sampled_from(ORDERS)),
        "within": draw(st.sampled_from(WITHIN)),
    }


COMMON = ("min_snr", "soft_min_snr", "sigmoid", "unit_epsilon")  # finite for most


class Combination(NamedTuple):
    """Plain values: everything that a run would say of its timesteps."""

    scheduler: tuple[str, int]
    sampler: Settings
    weighting: str
    weighting_args: Settings
    prediction_type: str | None


@st.composite
def combinations(draw: st.DrawFn, walk: str) -> Combination:
    scheduler = draw(st.sampled_from(sorted(SCHEDULERS))), draw(st.sampled_from([50, 97, 120, 200]))
    weighting = draw(
        st.sampled_from(["none", *COMMON, "none", *COMMON, *COMMON, *sorted(WEIGHTINGS)])
    )
    args = draw(some_of(measure=st.sampled_from(MEASURES), normalise=st.booleans()))
    own_target = {"flow": "flow", "flow_shift_3": "flow", "edm": "edm"}
    shared = draw(shared_settings(walk))
    if scheduler[0] in own_target:
        shared["continuous"] = draw(st.booleans())
    fitting = ["epsilon", "sample", own_target.get(scheduler[0], "v_prediction")]
    kind = draw(st.sampled_from([None, *fitting, *fitting, draw(st.sampled_from([*TARGETS]))]))
    return Combination(
        scheduler,
        draw(samplers(walk, Given(shared, fitting))),
        weighting,
        {} if weighting == "none" else args,
        kind,
    )


# -- building --------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def scheduler_of(name: str, levels: int) -> Any:
    return SCHEDULERS[name](num_train_timesteps=levels)


def build(config: Settings, scheduler: Any) -> TimestepSampler:
    """The sampler of a config, every part of it with ``scheduler``."""
    arguments: Settings = {k: v for k, v in config.items() if k != "_class_name"}
    kind: Any = TimestepSampler.kinds()[config["_class_name"]]
    if "phases" in arguments:
        phases = arguments.pop("phases")
        built = [p | {"sampler": build(p["sampler"], scheduler)} for p in phases]
        return kind(built, **arguments)
    if "base" in arguments:
        return kind(build(arguments.pop("base"), scheduler), **arguments)
    return kind(scheduler, **arguments)


def words(value: Any) -> Iterator[str]:
    """The names of arguments in a config, and the names that are their values."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from words(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from words(inner)
    elif isinstance(value, str):
        yield value


def check_refusal(error: ValueError, combination: Combination) -> None:
    """The message shows a value, and names an argument of this combination or what it was."""
    message = str(error)
    assert re.search(r"\d|'[^']+'", message), message
    said = set(re.findall(r"\w+", message.lower()))
    given_names = {w.lower() for w in words(combination._asdict())} | {"weights", "phase"}
    assert said & given_names - {"none", "density", "scheduler"}, message


# -- what must hold where it works -----------------------------------------------------------------


def expected_reference(sampler: TimestepSampler, step: int) -> Tensor:
    """(T,) uniform over the open levels: what the correction corrects to."""
    if isinstance(sampler, CurriculumTimestepSampler):
        kept = expected_reference(sampler.base, step) * sampler.open_levels(sampler.stage(step))
        return kept / kept.sum()
    if isinstance(sampler, SequenceTimestepSampler):
        number = int(np.searchsorted(sampler.starts, step, side="right")) - 1
        since, mix = step - sampler.starts[number], sampler.config["mix_steps"]
        new = expected_reference(sampler.samplers[number], since)
        if number == 0 or since >= mix:
            return new
        past = step - sampler.starts[number - 1]
        share = (since + 1) / (mix + 1)
        return share * new + (1 - share) * expected_reference(sampler.samplers[number - 1], past)
    return torch.full((len(sampler.levels),), 1 / len(sampler.levels), dtype=torch.float64)


def check_law(sampler: TimestepSampler, step: int) -> None:
    mass, importance = sampler.probabilities(step), sampler.importance(step)
    assert bool((mass >= 0).all())
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((importance.isfinite() & (importance >= 0)).all())
    assert float((mass * importance).sum()) == pytest.approx(1, abs=1e-9)
    if sampler.exponent == 0:
        assert bool((importance == 1).all())
    if sampler.exponent != 1:
        return
    reference = expected_reference(sampler, step) * (mass > 0)  # what is never drawn has no mean
    reference = reference / reference.sum()
    log_snr = sampler.levels.log_snr
    index = torch.arange(len(mass), dtype=torch.float64)
    for f in (torch.ones_like(mass), index, torch.where(log_snr.isfinite(), log_snr, 0.0)):
        drawn, wanted = float((mass * importance * f).sum()), float((reference * f).sum())
        assert drawn == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def train(sampler: TimestepSampler, steps: range) -> list[Tensor]:
    """What is drawn in these steps, with a loss observed after each of them."""
    drawn = []
    for step in steps:
        sample = sampler.sample(BATCH)
        losses = ((sample.indices * 7919 + step * 104729) % 1009).float() / 1024
        for inner in gradient_norm_samplers(sampler):
            inner.observe_gradients(sample.indices, losses, step)
        sampler.observe(sample.indices, losses, step)
        drawn += parts(sample)
        assert sample.log_snr is None or bool(sample.log_snr.isfinite().all())
    return drawn


def copy_of(sampler: TimestepSampler) -> TimestepSampler:
    """The sampler whose config is the text that would be in a file."""
    return TimestepSampler.from_config(json.loads(sampler.to_json_string()))


def check_state(sampler: TimestepSampler) -> None:
    """A copy with the state draws, learns and goes on as the sampler does."""
    train(sampler, OBSERVED)
    resumed = copy_of(sampler)
    resumed.load_state_dict(sampler.state_dict())
    later = range(LEARNED, LEARNED + 3)
    for mine, theirs in zip(train(sampler, later), train(resumed, later), strict=True):
        assert torch.equal(mine, theirs)


def check_weights(weights: Tensor | None, masses: Tensor | None) -> None:
    if weights is None:
        return
    assert bool((weights.isfinite() & (weights >= 0)).all())
    if masses is not None:
        assert float((weights.double() * masses).sum()) == pytest.approx(1, abs=1e-5)


def outcome(combination: Combination) -> str:
    """What became of it: refused, works, or works and learned; all that must hold is checked."""
    try:
        sampler = build(combination.sampler, scheduler_of(*combination.scheduler))
        kind = combination.prediction_type or sampler.levels.prediction_type
        objective = Objective(sampler.levels.with_prediction_type(kind))
        args = dict(combination.weighting_args)
        if args.get("normalise"):
            args["masses"] = sampler.probabilities(0) * sampler.importance(0)
        weights = loss_weights(combination.weighting, objective.levels, **args)
    except ValueError as error:
        check_refusal(error, combination)
        return "refused"
    check_weights(weights, args.get("masses"))
    copy = copy_of(sampler)
    for step in (0, LEARNED, LATE):
        check_law(sampler, step)
        assert torch.equal(copy.probabilities(step), sampler.probabilities(step))
    check_state(sampler)
    for step in (LEARNED + 3, LATE):
        check_law(sampler, step)
    learned = sampler.metrics().get("law_is_learned", False)
    return "works and learned" if learned else "works"


# -- what the walk found ---------------------------------------------------------------------------


def test_a_phase_to_come_outside_the_open_levels_is_refused() -> None:
    """A law that changes must have mass on every stage in all of its phases."""
    scheduler = scheduler_of("sd", 50)
    clean = {"density": "truncated", "density_args": {"density": "uniform", "max_timestep": 9}}
    phases = [
        {"until": 2, "sampler": {"density": "uniform", "floor": 0.0}},
        {"until": None, "sampler": {**clean, "floor": 0.0}},
    ]
    later = SequenceTimestepSampler.from_scheduler(scheduler, phases)
    with pytest.raises(ValueError, match="no mass on stage 1"):
        CurriculumTimestepSampler(later, 5, "uniform")
    CurriculumTimestepSampler(later, 5, "uniform", order="hard_to_easy")
    with pytest.raises(ValueError, match="no mass on stage"):
        CurriculumTimestepSampler(later, 5, "uniform", order="hard_to_easy", within="balanced")


@pytest.mark.parametrize("within", WITHIN)
def test_a_learned_law_that_is_0_on_the_open_levels_still_draws(within: str) -> None:
    """Here the weight in the law is 0 at zero terminal SNR, the one level of the first stage."""
    scheduler = SCHEDULERS["sd_zero_terminal"](
        num_train_timesteps=50, prediction_type="v_prediction"
    )
    soon = {"bins": 50, "min_observations": 1, "refresh_every": 1, "loss_weighting": "min_snr"}
    base = SAMPLERS["loss_second_moment"](scheduler, **soon)
    sampler = CurriculumTimestepSampler(
        base,
        clustering="explicit",
        clustering_args={"boundaries": [0, 49]},
        pacing="fixed",
        pacing_args={"stage_steps": 5},
        within=within,
    )
    base.observe(torch.arange(50), torch.linspace(0.1, 1, 50), 0)
    assert bool(base.metrics()["law_is_learned"])
    for step in (0, 4, 5):
        check_law(sampler, step)
    assert sampler.sample(4, step=4).indices.tolist() == [49] * 4


@pytest.mark.parametrize(("mean", "std"), [(-6.0, 0.2), (-10.0, 0.2), (-12.0, 0.5)])
def test_a_mass_too_small_to_divide_by_leaves_the_others_their_importance(
    mean: float, std: float
) -> None:
    """1 / mass is infinite below 5e-309, and infinity in the mean would make all importances 0."""
    config = {
        "_class_name": "DensityTimestepSampler",
        "density": "normal",
        "density_args": {"mean": mean, "std": std},
        "floor": 0.0,
        "importance_correction": "full",
    }
    sampler = build(config, scheduler_of("edm", 200))
    mass = sampler.probabilities()
    assert bool(((mass > 0) & (mass < 1e-307)).any())
    importance = sampler.importance()
    assert bool(importance.isfinite().all())
    assert float((mass * importance).sum()) == pytest.approx(1, abs=1e-9)


# -- the walk --------------------------------------------------------------------------------------

WALKS = ("density", "learning", *NESTED)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


def walk_through(walk: str, examples: int, distinct: int) -> None:
    """So many combinations; at least three of five must work."""
    told: Counter[str] = Counter()
    seen = set()

    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET)
    @given(combinations(walk))
    def one(combination: Combination) -> None:
        told[outcome(combination)] += 1
        seen.add(json.dumps(combination))

    one()
    print(f"{walk}: {dict(told)}, {len(seen)} distinct")
    assert told.total() >= examples
    assert told["refused"] <= 0.4 * examples
    assert len(seen) >= distinct
    if walk == "learning":
        assert told["works and learned"] >= 0.2 * examples


@pytest.mark.parametrize(
    ("examples", "distinct"), [(100, 80), pytest.param(300, 250, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("walk", WALKS)
def test_a_thousand_combinations_work_or_are_refused(
    walk: str, examples: int, distinct: int
) -> None:
    walk_through(walk, examples, distinct)
