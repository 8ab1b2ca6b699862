"""Levels per token: one law for all, three arrangements, one process or two, any sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler, Slots
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.samplers import PerSourceTimestepSampler, TimestepSampler
from diffusers_curriculum.samplers.tokens import ARRANGEMENTS, token_uniforms
from tests.floors_fixtures import SCHEDULERS

BATCH, TOKENS = 6, 5


def law(schedule: str = "flow", **more: Any) -> TimestepSampler:
    settings: dict[str, Any] = {"draw": "stratified", "floor": 0.0} | more
    return DensityTimestepSampler(SCHEDULERS[schedule](), "laplace", **settings)


@pytest.mark.parametrize("draw", ["iid", "stratified", "sobol"])
def test_independent_tokens_share_the_strata_of_the_batch(draw: str) -> None:
    u = token_uniforms(draw, 1000, 50, seed=0, step=0).numpy()
    assert u.shape == (1000, 50)
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-4
    assert stats.kstest(u[:, 7], "uniform").pvalue > 1e-4
    between = np.corrcoef(u.T)[np.triu_indices(50, 1)]
    assert np.abs(between).max() < 0.2
    if draw == "stratified":
        assert (np.bincount((u.ravel() * 50_000).astype(int)) == 1).all()


def test_one_process_and_two_see_the_same() -> None:
    for arrangement in ARRANGEMENTS:
        own: dict[str, Any] = {"tokens": TOKENS, "arrangement": arrangement, "step": 3}
        whole = law().sample(Slots(0, 6, 12), **own).timesteps
        parts = [law().sample(Slots(start, 3, 12), **own).timesteps for start in (0, 3)]
        assert torch.equal(whole, torch.cat(parts))


def test_a_token_later_is_no_cleaner() -> None:
    drawn = law().sample(200, tokens=TOKENS, arrangement="monotone", step=0)
    assert (drawn.timesteps.diff(dim=-1) >= 0).all()
    plain = law().sample(200, tokens=TOKENS, step=0)
    assert torch.equal(drawn.indices, plain.indices.sort(-1).values)


@pytest.mark.parametrize("draw", ["iid", "stratified"])
def test_one_token_leads_and_the_others_are_cleaner(draw: str) -> None:
    u = token_uniforms(draw, 20_000, TOKENS, "leading", seed=0, step=0)
    level, place = u.max(-1)
    # the leading token has the law that is drawn, at any place; the others are uniform below it
    assert stats.kstest(level.numpy(), "uniform").pvalue > 1e-4
    assert stats.chisquare(torch.bincount(place).numpy()).pvalue > 1e-4
    others = (u / level[:, None])[torch.arange(TOKENS) != place[:, None]]
    assert stats.kstest(others.numpy()[:5000], "uniform").pvalue > 1e-4


@pytest.mark.parametrize("continuous", [True, False])
def test_a_draw_has_a_level_weight_and_loss_for_each_token(continuous: bool) -> None:
    sampler = law(importance_correction="full", floor=0.5, continuous=continuous)
    drawn = sampler.sample(BATCH, tokens=TOKENS, step=0)
    for part in (drawn.timesteps, drawn.indices, drawn.importance, drawn.at):
        assert part.shape == (BATCH, TOKENS)
    objective = Objective(sampler.levels)
    clean, noise = torch.randn(2, BATCH, TOKENS, 3, 4)
    noisy = objective.add_noise(clean, noise, drawn.at)
    target = objective.target(clean, noise, drawn.at)
    loss, losses = objective.loss(noisy, target, drawn.importance, per_token=True)
    assert losses.shape == (BATCH, TOKENS)
    assert torch.allclose(loss, (losses * drawn.importance).mean())
    for i, k in ((0, 0), (2, 3)):
        at, pair = drawn.at[i, k][None], (clean[i, k][None], noise[i, k][None])
        assert torch.equal(noisy[i, k], objective.add_noise(*pair, at)[0])
        assert torch.equal(target[i, k], objective.target(*pair, at)[0])
    # one token is a sample
    assert torch.equal(
        sampler.sample(BATCH, tokens=1, step=0).timesteps[:, 0],
        sampler.sample(BATCH, step=0).timesteps,
    )


def test_a_curriculum_learns_from_all_tokens() -> None:
    sampler = CurriculumTimestepSampler(
        law("sd"), clusters=4, pacing="patience", pacing_args={"patience": 2, "smoothing": 0.0}
    )
    for step in range(20):
        drawn = sampler.sample(BATCH, tokens=TOKENS, step=step)
        assert (sampler.open_levels(sampler.stage(step))[drawn.indices]).all()
        sampler.observe(drawn.indices.flatten(), torch.ones(BATCH * TOKENS), step)
    assert sampler.stage(20) > 1
    assert int(sampler.cluster_counts.sum()) == 20 * BATCH * TOKENS


def test_each_source_has_its_law_for_all_its_tokens() -> None:
    laws = [law("sd", seed=1), DensityTimestepSampler(SCHEDULERS["sd"](), "uniform", seed=1)]
    both = PerSourceTimestepSampler(laws, (0, 1))
    sources = [0, 1, 1, 0, 1, 0]
    drawn = both.sample(BATCH, tokens=TOKENS, step=2, sources=sources)
    assert drawn.timesteps.shape == (BATCH, TOKENS)
    u = token_uniforms(both.draw, BATCH, TOKENS, seed=both.seed, step=2)
    for row, source in enumerate(sources):
        alone = both.parts[source].sample(u=u[row], step=2)
        assert torch.equal(drawn.timesteps[row], alone.timesteps)


def test_what_is_no_arrangement_is_refused() -> None:
    with pytest.raises(ValueError, match=r"arrangement 'monoton'.*monotone"):
        law().sample(2, tokens=2, arrangement="monoton")
    with pytest.raises(ValueError, match="tokens=0"):
        law().sample(2, tokens=0)
