"""Loss weights that are learned beside a model, by a step of their own after the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_curriculum import LearnedLossWeights, UncertaintyWeighting
from diffusers_curriculum.weighting.learned import LEARNED_WEIGHTINGS
from tests.floors_fixtures import levels_of

LEVELS = levels_of("sd")


def profile(indices: torch.Tensor) -> torch.Tensor:
    """A mean loss for each level, from 1 at the cleanest to 0.02 at the noisiest."""
    return 0.02 + 0.98 * (1 - indices / 999.0) ** 2


def batches(steps: int, size: int = 64) -> Any:
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        indices = torch.randint(1000, (size,), generator=draw)
        noise = 0.5 + torch.rand(size, generator=draw)  # mean 1
        yield indices, profile(indices) * noise


def test_every_level_ends_with_the_same_weighted_loss() -> None:
    learned = LearnedLossWeights(LEVELS, learning_rate=0.05)
    for indices, losses in batches(1500):
        learned.observe(indices, losses)
    weighted = learned.weights(1500) * profile(torch.arange(1000))
    assert float(weighted[20:].min()) > 0.8
    assert float(weighted[20:].max()) < 1.25
    assert float(profile(torch.arange(1000)).min()) < 0.03  # without weights they differ 50 times


def test_it_is_the_joint_training() -> None:
    """Against the loss of the paper differentiated as one, network (a scale) and z together."""
    learned = LearnedLossWeights(LEVELS, learning_rate=0.02)
    joint = UncertaintyWeighting(LEVELS)
    scale, own = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(()))
    z_step = torch.optim.AdamW(joint.parameters(), lr=0.02, betas=(0.9, 0.99), weight_decay=0.0)
    steps = [torch.optim.SGD([scale], lr=0.01), torch.optim.SGD([own], lr=0.01)]
    for step, (indices, losses) in enumerate(batches(30)):
        both, _ = joint(losses * scale.square(), indices)
        both.mean().backward()
        mine = losses * own.square()
        (mine * learned.weights(step)[indices]).mean().backward()
        assert scale.grad is not None
        torch.testing.assert_close(own.grad, scale.grad, rtol=1e-5, atol=0)
        learned.observe(indices, mine.detach())
        for optimizer in (*steps, z_step):
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(learned.uncertainty.weight, joint.weight, rtol=1e-4, atol=1e-7)


def test_a_floor_of_a_thousandth_is_above_some_losses_of_linear_betas() -> None:
    """As the catalogue tells: the exact epsilon loss of unit data is S / (1 + S)."""
    snr = levels_of("linear").log_snr.exp()
    small = (snr / (1 + snr) < 0.001).double().mean()
    assert float(small) == pytest.approx(0.175, abs=5e-4)
    assert "17.5 %" in LEARNED_WEIGHTINGS.entry("uncertainty").note


def test_warm_up_and_floor() -> None:
    learned = LearnedLossWeights(LEVELS, warm_up=5, floor=0.5, learning_rate=0.1)
    for indices, losses in batches(300):
        learned.observe(indices, losses * 1e-3)
    assert torch.equal(learned.weights(4), torch.ones(1000))
    bounded = learned.weights(5)
    assert float(bounded.max()) == 2.0
    assert float(bounded.min()) >= 0.5


def test_a_loss_that_is_not_finite_is_no_observation() -> None:
    one, other = LearnedLossWeights(LEVELS), LearnedLossWeights(LEVELS)
    indices = torch.arange(0, 1000, 100)
    losses = profile(indices)
    spoilt = torch.cat([losses, torch.tensor([torch.nan, torch.inf])])
    one.observe(indices, losses)
    other.observe(torch.cat([indices, torch.tensor([3, 4])]), spoilt)
    torch.testing.assert_close(one.weights(1), other.weights(1))
    other.observe(torch.tensor([5]), torch.tensor([torch.nan]))
    assert bool(other.weights(2).isfinite().all())


@pytest.mark.parametrize("stopped", [0, 1, 7])
def test_its_state_goes_on_bit_for_bit(stopped: int) -> None:
    seen = list(batches(12))
    one, other = LearnedLossWeights(LEVELS), LearnedLossWeights(LEVELS)
    for step, batch in enumerate(seen):
        if step == stopped:
            state = one.state_dict()
            assert state.keys() == LearnedLossWeights(LEVELS).state_dict().keys()
            other.load_state_dict(state)
        one.observe(*batch)
        if step >= stopped:
            other.observe(*batch)
    assert torch.equal(one.weights(12), other.weights(12))
    assert not torch.equal(one.weights(12), torch.ones(1000))


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    LearnedLossWeights(LEVELS).observe(torch.arange(8), torch.ones(8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0},
        {"learning_rate": True},
        {"warm_up": -1},
        {"warm_up": 1.5},
        {"floor": 0.0},
        {"floor": 1.5},
        {"floor": float("nan")},
        {"features": 0},
    ],
)
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}="):
        LearnedLossWeights(LEVELS, **wrong)
