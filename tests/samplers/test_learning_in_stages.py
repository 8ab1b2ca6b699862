"""A law that learns under a curriculum learns on the open levels; the closed ones keep the warm-up
law."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_curriculum.samplers import (
    AdaptiveTimestepSampler,
    CurriculumTimestepSampler,
    SequenceTimestepSampler,
)
from diffusers_curriculum.weighting import loss_weights
from tests.samplers.adaptive_fixtures import KINDS, build, loss_profile

CPU = torch.device("cpu")
CLUSTERS: dict[str, Any] = {"clusters": 4, "clustering": "uniform"}
STAGES: dict[str, Any] = {**CLUSTERS, "pacing": "fixed", "pacing_args": {"stage_steps": 10}}
# bins that end where clusters do, and no averages over neighbours: what is learned is exact
_PER_DRAW = {"proportional": {"measure": "draw"}}
EXACT: dict[str, Any] = {"neighbours": 0, "bins": 1000, "min_observations": 1}


def _see_open(sampler: CurriculumTimestepSampler, steps: range, profile: Tensor) -> None:
    """Show the loss of every level that is open at each step."""
    for step in steps:
        indices = sampler.open_levels(sampler.stage(step)).nonzero().flatten()
        sampler.observe(indices, profile[indices], step)


def _rule(base: AdaptiveTimestepSampler, profile: Tensor) -> Tensor:
    """The law that ``base`` has once it has seen the loss of every level."""
    whole = build(_kind_of(base), bins=len(profile), neighbours=0)
    for step in range(10):
        whole.observe(torch.arange(len(profile)), profile, step)
    return whole.law(0, CPU)


def _kind_of(base: AdaptiveTimestepSampler) -> str:
    return next(name for name in KINDS if type(build(name)) is type(base))


@pytest.mark.parametrize(
    "kind", ["second_moment", "published", "proportional", "gradient_surrogate"]
)
def test_the_open_levels_have_the_learned_law_from_the_first_stage_on(kind: str) -> None:
    base = build(kind, **EXACT)
    sampler = CurriculumTimestepSampler(base, **STAGES)
    profile = loss_profile(1000)
    rule = _rule(base, profile)
    for stage in (1, 2, 3, 4):
        _see_open(sampler, range(10 * stage - 10, 10 * stage), profile)
        opened = sampler.open_levels(stage)
        law = base.law(0, CPU)
        torch.testing.assert_close(
            law[opened] / law[opened].sum(), rule[opened] / rule[opened].sum(), rtol=1e-10, atol=0
        )
        # the mass that the warm-up law gives them, and that law where it is closed
        assert float(law[opened].sum()) == pytest.approx(stage / 4, rel=1e-12)
        assert bool((law[~opened] == 1 / 1000).all())
        mass = sampler.probabilities(10 * stage - 1)
        assert not bool(mass[~opened].any())
        assert float(mass.sum()) == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(base.law(0, CPU), rule, rtol=1e-12, atol=0)


def test_levels_that_open_keep_the_warm_up_law_until_all_of_them_are_known() -> None:
    settings = EXACT | {"min_observations": 3, "refresh_every": 1, "measure": "draw"}
    base = build("proportional", **settings)
    sampler = CurriculumTimestepSampler(base, **STAGES)
    profile = loss_profile(1000)
    _see_open(sampler, range(10), profile)
    first = sampler.open_levels(1)
    new = sampler.open_levels(2) & ~first
    learned = base.law(0, CPU)
    assert not torch.allclose(learned[first], learned[first].mean())
    _see_open(sampler, range(10, 12), profile)  # two of three observations
    assert torch.equal(base.law(0, CPU)[new], learned[new])
    assert float(base.metrics()["law_is_learned"]) == 0.25
    _see_open(sampler, range(12, 13), profile)
    law = base.law(0, CPU)
    torch.testing.assert_close(law[new] / law[new].sum(), profile[new] / profile[new].sum())
    assert float(base.metrics()["law_is_learned"]) == 0.5


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "information"])
def test_bins_that_a_cluster_cuts_and_neighbours_are_not_taken_for_losses_of_0(kind: str) -> None:
    """Default bins: equal losses give the warm-up law, whatever is open."""
    base = build(kind, **_PER_DRAW.get(kind, {}))
    sampler = CurriculumTimestepSampler(base, **STAGES)
    _see_open(sampler, range(10), torch.ones(1000, dtype=torch.float64))
    assert bool(base.metrics()["law_is_learned"])
    torch.testing.assert_close(base.law(0, CPU), torch.full((1000,), 1e-3, dtype=torch.float64))


def test_nothing_waits_for_what_an_outer_curriculum_or_a_sequence_keeps_closed() -> None:
    profile = loss_profile(1000)
    quick: dict[str, Any] = STAGES | {"pacing_args": {"stage_steps": 1}}
    for nested in (True, False):
        base = build("second_moment", **EXACT)
        inner = (
            CurriculumTimestepSampler(base, **quick)
            if nested
            else SequenceTimestepSampler([{"sampler": base}])
        )
        outer = CurriculumTimestepSampler(inner, **STAGES)
        _see_open(outer, range(10), profile)
        assert float(base.metrics()["law_is_learned"]) == 0.25


def test_without_a_curriculum_the_law_still_waits_for_every_bin() -> None:
    base = build("second_moment", bins=10)
    for step in range(20):
        base.observe(torch.arange(900), torch.ones(900), step)
    assert not bool(base.metrics()["law_is_learned"])
    base.observe(torch.arange(1000), torch.ones(1000), 20)
    base.observe(torch.arange(1000), torch.ones(1000), 24)
    assert float(base.metrics()["law_is_learned"]) == 1


def test_the_onset_rule_of_the_gate_waits_for_the_whole_schedule() -> None:
    base = build("information", bins=1000, neighbours=0)
    sampler = CurriculumTimestepSampler(base, **STAGES)
    lam = base.levels.log_snr
    x0_error = 0.25 / (1 + lam.exp() * 0.25)
    profile = lam.exp() * x0_error
    for stage in (1, 2, 3):
        _see_open(sampler, range(10 * stage - 10, 10 * stage), profile)
        assert float(base.metrics()["gate"]) == 0
        law, opened = base.law(0, CPU), sampler.open_levels(stage)
        rate = (x0_error * -base.levels.edges.diff())[opened]  # over W_x0 = S
        torch.testing.assert_close(law[opened] / law[opened].sum(), rate / rate.sum())
    _see_open(sampler, range(30, 40), profile)
    assert float(base.metrics()["gate"]) > 0


# -- states of older versions ----------------------------------------------------------------------


def _as_before(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The state with one flag for all bins, as versions before wrote it."""
    name = f"{prefix}state.learned"
    return state | {name: state[name].all()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", ["nothing", "curriculum", "sequence"])
def test_an_older_state_goes_on(kind: str, around: str) -> None:
    def sampler() -> tuple[Any, AdaptiveTimestepSampler, str]:
        base = build(kind, prediction_type="v_prediction", **_PER_DRAW.get(kind, {}))
        if around == "curriculum":
            return CurriculumTimestepSampler(base, **STAGES), base, "base."
        if around == "sequence":
            return SequenceTimestepSampler([{"sampler": base}]), base, "phase1."
        return base, base, ""

    (first, _, prefix), (second, base, _) = sampler(), sampler()
    for step in range(40, 50):
        first.observe(torch.arange(1000), loss_profile(1000), step)
    old = _as_before(first.state_dict(), prefix)
    second.load_state_dict(second.upgraded(old))
    assert float(base.metrics()["law_is_learned"]) == 1
    assert torch.equal(first.probabilities(50), second.probabilities(50))
    second.load_state_dict(old)
    assert torch.equal(first.probabilities(50), second.probabilities(50))


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "information"])
def test_an_older_state_is_of_unweighted_losses(kind: str) -> None:
    """The law stays, and goes on from averages as good as bins allow."""
    settings = {"loss_weighting": "min_snr", "loss_weighting_args": {"gamma": 1.0}}
    plain = build(kind, **_PER_DRAW.get(kind, {}))
    weighted = build(kind, **settings, **_PER_DRAW.get(kind, {}))
    for step in range(10):
        plain.observe(torch.arange(1000), loss_profile(1000), step)
    weighted.load_state_dict(_as_before(plain.state_dict()))
    weights = loss_weights("min_snr", plain.levels, gamma=1.0)
    assert weights is not None
    law = plain.law(0, CPU) * weights
    before = weighted.law(0, CPU)
    torch.testing.assert_close(before, law / law.sum(), rtol=1e-6, atol=0)
    weighted.observe(torch.arange(0), torch.ones(0), 14)  # a new law of the old averages
    after = weighted.law(0, CPU)
    assert kind == "published" or not torch.equal(before, after)
    assert float((after - before).abs().sum() / 2) < 0.05


def test_an_older_state_of_x0_errors_keeps_its_law() -> None:
    first, second = (build("information", prediction_type="sample", gate=0) for _ in range(2))
    lam = first.levels.log_snr
    per_x0 = 0.09 / (1 + 0.09 * lam.exp())
    for step in range(10):
        first.observe(torch.arange(1000), per_x0, step)
    old, scale = _as_before(first.state_dict()), 1 + lam.exp()
    old |= {"state.profile": old["state.profile"] / scale}
    old |= {"state.total": old["state.evidence"] * _bin_means(first, per_x0)}
    second.load_state_dict(old)
    torch.testing.assert_close(first.law(0, CPU), second.law(0, CPU), rtol=1e-10, atol=0)
    second.observe(torch.arange(0), torch.ones(0), 14)
    assert float((first.law(0, CPU) - second.law(0, CPU)).abs().sum() / 2) < 0.02


def _bin_means(sampler: AdaptiveTimestepSampler, profile: Tensor) -> Tensor:
    starts = [*sampler.state_dict()["starts"].tolist(), len(profile)]
    return torch.stack([profile[a:b].mean() for a, b in pairwise(starts)])
