"""The learned uncertainty weighting: its optimum, its gradients, its state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_curriculum.weighting.learned import (
    LEARNED_WEIGHTINGS,
    LearnedLossWeights,
    UncertaintyWeighting,
)
from tests.floors_fixtures import levels_of, table, untouched_global_generators

LEVELS = torch.arange(1000)


def mean_losses(log_snr: Tensor) -> Tensor:
    """A mean error over noise levels of the kind one sees: 0.003 to about 1, smooth."""
    return 0.003 + torch.sigmoid(-log_snr / 2) * (1 + 0.3 * torch.sin(log_snr))


def fit(weighting: UncertaintyWeighting, losses: Tensor) -> None:
    """Minimise the mean over all levels to convergence; the problem is convex."""
    optimizer = torch.optim.LBFGS(
        weighting.parameters(), max_iter=500, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        optimizer.zero_grad()
        loss = weighting(losses, LEVELS)[0].mean()
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)


def by_hand(weighting: UncertaintyWeighting, weight: np.ndarray, log_snr: np.ndarray) -> np.ndarray:
    """z in float64: sum_k w_k sqrt(2) cos(f_k x + p_k) / sqrt(n), x = ln(sigma) / 4."""
    x = np.log(np.exp(-log_snr / 2)) / 4
    f, p = weighting.frequencies.double().numpy(), weighting.phases.double().numpy()
    return (np.sqrt(2) * np.cos(np.outer(x, f) + p) @ weight) / np.sqrt(len(weight))


@pytest.mark.parametrize("schedule", ["linear", "sd"])
def test_it_converges_to_the_log_of_the_mean_loss(schedule: str) -> None:
    levels = levels_of(schedule)
    means = mean_losses(levels.log_snr).float()
    weighting = UncertaintyWeighting(levels)
    fit(weighting, means)
    z = weighting.log_variance().detach()
    off = (z - means.log()).abs()
    assert float(off.mean()) < 0.01
    assert float(off.max()) < 0.1  # at the very ends, which few levels hold
    weighted, _ = weighting(means, LEVELS)  # 1 + z* + O(off^2) at the minimum
    torch.testing.assert_close(weighted.detach(), 1 + means.log(), atol=5e-3, rtol=0)
    share = means * (-z).exp()  # every level contributes the same
    torch.testing.assert_close(share, torch.ones(1000), atol=0.1, rtol=0)


def test_a_fixed_weighting_only_shifts_the_optimum() -> None:
    levels = levels_of("sd")
    means = mean_losses(levels.log_snr).float()
    fixed = (levels.log_snr / 4).exp().float()
    plain, weighted = UncertaintyWeighting(levels), UncertaintyWeighting(levels)
    fit(plain, means)
    fit(weighted, fixed * means)
    effective = [
        w * (-u.log_variance()).exp().detach()
        for w, u in ((torch.ones(1000), plain), (fixed, weighted))
    ]
    torch.testing.assert_close(effective[0], effective[1], atol=0, rtol=0.06)


def test_noisy_losses_and_adam_lead_there_too() -> None:
    levels = levels_of("sd")
    means = mean_losses(levels.log_snr).float()
    weighting = UncertaintyWeighting(levels)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 1500)
        indices = torch.randint(1000, (256,), generator=generator)
        noise = torch.randn(256, 8, generator=generator).square().mean(1)  # mean 1
        loss = weighting(means[indices] * noise, indices)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    off = (weighting.log_variance().detach() - means.log()).abs()
    assert float(off.mean()) < 0.05
    assert float(off[20:-20].max()) < 0.3


def test_it_starts_as_the_unweighted_loss() -> None:
    weighting = UncertaintyWeighting(levels_of("sd"))
    losses = torch.rand(8, generator=torch.Generator().manual_seed(0))
    weighted, z = weighting(losses, torch.arange(8))
    assert torch.equal(weighted, losses)
    assert torch.equal(z, torch.zeros(8))


def test_gradients_against_finite_differences() -> None:
    levels = levels_of("sd")
    weighting = UncertaintyWeighting(levels, features=16, seed=3)
    rng = np.random.default_rng(0)
    weight, indices = rng.normal(size=16), np.array([3, 500, 500, 998])
    losses = np.array([0.2, 1.5, 0.7, 3.0])
    log_snr = levels.log_snr.numpy()[indices]

    def objective(weight: np.ndarray, losses: np.ndarray) -> float:
        z = by_hand(weighting, weight, log_snr)
        return float(np.mean(losses * np.exp(-z) + z))

    def slopes(which: int) -> list[float]:
        at, h = [weight, losses], 1e-5
        steps = h * np.eye(len(at[which]))
        pairs = [[a + s if i == which else a for i, a in enumerate(at)] for s in (*steps, *-steps)]
        values = np.array([objective(*pair) for pair in pairs])
        return ((values[: len(steps)] - values[len(steps) :]) / (2 * h)).tolist()

    with torch.no_grad():
        weighting.weight.copy_(torch.from_numpy(weight))
    leaves = torch.from_numpy(losses).float().requires_grad_()
    total, z = weighting(leaves, torch.from_numpy(indices))
    total.mean().backward()
    np.testing.assert_allclose(z.detach(), by_hand(weighting, weight, log_snr), atol=2e-6)
    assert weighting.weight.grad is not None
    assert leaves.grad is not None
    np.testing.assert_allclose(weighting.weight.grad, slopes(0), atol=5e-6, rtol=1e-5)
    np.testing.assert_allclose(leaves.grad, slopes(1), atol=5e-6, rtol=1e-5)


# -- state -----------------------------------------------------------------------------------------


def train(weighting: UncertaintyWeighting, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        indices = torch.randint(1000, (32,), generator=generator)
        loss = weighting(torch.rand(32, generator=generator), indices)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adam(weighting: UncertaintyWeighting) -> Any:
    return torch.optim.AdamW(weighting.parameters(), lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("seed", [0, 5])
def test_resumed_it_goes_on_bit_for_bit(tmp_path: Path, seed: int) -> None:
    levels = levels_of("sd")
    whole = UncertaintyWeighting(levels)
    optimizer = adam(whole)
    train(whole, optimizer, range(10))
    save_file(whole.state_dict(), tmp_path / "weighting.safetensors")
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = UncertaintyWeighting(levels, seed=seed)  # the file holds the features, not the seed
    resumed.load_state_dict(load_file(tmp_path / "weighting.safetensors"))
    second = adam(resumed)
    second.load_state_dict(saved)
    train(whole, optimizer, range(10, 20))
    train(resumed, second, range(10, 20))
    assert torch.equal(resumed.log_variance(), whole.log_variance())
    assert float(whole.log_variance().detach().abs().max()) > 0.01


def test_the_state_is_a_function_of_log_snr_and_moves_to_another_schedule() -> None:
    one = UncertaintyWeighting(levels_of("sd"))
    with torch.no_grad():
        one.weight.copy_(torch.linspace(-1, 1, 128))
    other = UncertaintyWeighting(levels_of("linear"))
    other.load_state_dict(one.state_dict())
    at_sd, at_linear = levels_of("sd").log_snr[700], levels_of("linear").log_snr
    near = int((at_linear - at_sd).abs().argmin())
    found, expected = other.log_variance()[near].detach(), one.log_variance()[700].detach()
    assert float(found) == pytest.approx(float(expected), abs=0.05)


def test_the_seed_makes_the_features_and_no_global_generator_is_touched() -> None:
    levels = levels_of("sd")
    with untouched_global_generators():
        one, two, other = (UncertaintyWeighting(levels, seed=s) for s in (7, 7, 8))
    assert torch.equal(one.frequencies, two.frequencies)
    assert torch.equal(one.phases, two.phases)
    assert not torch.equal(one.frequencies, other.frequencies)
    assert sorted(one.state_dict()) == ["frequencies", "phases", "weight"]
    assert [p.numel() for p in one.parameters()] == [128]
    assert torch.equal(
        UncertaintyWeighting(levels).phases, UncertaintyWeighting(levels, seed=0).phases
    )
    assert UncertaintyWeighting(levels, features=1).weight.shape == (1,)


def test_the_features_are_those_of_edm2() -> None:
    """sqrt(2) cos(2 pi f x + 2 pi p), f standard normal and p uniform: unit power on average."""
    weighting = UncertaintyWeighting(levels_of("sd"), features=20000)
    f = weighting.frequencies.double() / (2 * torch.pi)
    p = weighting.phases.double() / (2 * torch.pi)
    assert float(f.mean()) == pytest.approx(0, abs=0.03)
    assert float(f.std()) == pytest.approx(1, abs=0.03)
    assert float(p.min()) >= 0
    assert float(p.max()) < 1
    assert float(p.mean()) == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():  # one-hot weights would give one feature; all ones, their sum
        weighting.weight.fill_(1.0)
    assert float(weighting.log_variance()[500].detach()) == pytest.approx(0, abs=4)  # variance 1


@pytest.mark.parametrize("end", ["noisy", "clean"])
def test_a_level_at_infinite_log_snr_is_one_more_step_away(end: str) -> None:
    inner = [3.0, 2.0, 0.5]
    infinite = [*inner, -torch.inf] if end == "noisy" else [torch.inf, *inner]
    finite = [*inner, -1.0] if end == "noisy" else [4.0, *inner]
    z = []
    for log_snr in (infinite, finite):
        weighting = UncertaintyWeighting(table(log_snr))
        with torch.no_grad():
            weighting.weight.fill_(1.0)
        z.append(weighting.log_variance())
    assert torch.equal(z[0], z[1])
    assert len(set(z[0].tolist())) == 4


def test_losses_of_which_none_is_finite_teach_nothing() -> None:
    learner = LearnedLossWeights(levels_of("sd"), features=8)
    indices = torch.arange(0, 1000, 100)
    for losses, learns in ((torch.ones(10), True), (torch.full((10,), torch.nan), False)):
        before = learner.state_dict()
        learner.observe(indices, losses)
        after = learner.state_dict()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == ({"weight", "adam.step", "adam.exp_avg", "adam.exp_avg_sq"} & changed)
        assert bool(changed) == learns


# -- precision and errors --------------------------------------------------------------------------


def test_it_stays_float32_under_autocast() -> None:
    weighting = UncertaintyWeighting(levels_of("sd"))
    with torch.no_grad():
        weighting.weight.fill_(0.5)
    losses = torch.ones(4, dtype=torch.bfloat16)
    plain, z = weighting(losses, torch.arange(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, z_cast = weighting(losses, torch.arange(4))
    assert z.dtype == z_cast.dtype == cast.dtype == torch.float32
    assert torch.equal(z, z_cast)
    assert torch.equal(plain, cast)


def test_a_cast_module_is_refused() -> None:
    weighting = UncertaintyWeighting(levels_of("sd")).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"cast to torch.bfloat16.*keep it in float32"):
        weighting(torch.ones(2), torch.arange(2))


@pytest.mark.parametrize("features", [0, -1, 1.5, True, "128", 10**9])
def test_wrong_numbers_of_features_are_refused(features: Any) -> None:
    with pytest.raises(ValueError, match=r"features=.* must be a whole number from 1 to 65536"):
        UncertaintyWeighting(levels_of("sd"), features=features)


def test_losses_per_element_are_refused() -> None:
    weighting = UncertaintyWeighting(levels_of("sd"))
    with pytest.raises(ValueError, match=r"losses \(2, 4\) and indices \(2,\) must both have"):
        weighting(torch.ones(2, 4), torch.arange(2))


def test_what_the_catalogue_tells() -> None:
    entry = LEARNED_WEIGHTINGS.entry("uncertainty")
    assert (entry.name, entry.make) == ("uncertainty", LearnedLossWeights)
    assert "2312.02696" in entry.source
