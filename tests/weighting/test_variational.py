"""The variational term against torch's KL, brute-force posteriors and diffusers' own variances."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.weighting.variational import VariationalBound
from tests.floors_fixtures import SCHEDULERS, levels_of, table

KINDS = ("epsilon", "v_prediction", "sample")
BETAS = torch.linspace(1e-3, 0.3, 12, dtype=torch.float64)


def small_levels(kind: str = "epsilon") -> NoiseLevels:
    """Twelve levels of these betas in float64, free of the float32 of schedulers."""
    power = (1 - BETAS).cumprod(0)
    return table(power.log() - torch.log1p(-power), prediction_type=kind)


def batch(levels: NoiseLevels, indices: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """A sample, its noisy version, a wrong prediction and a variance part at ``indices``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, len(indices), 2, 3, 3)
    x0, noise, wrong, v = torch.randn(shape, generator=generator, dtype=torch.float64).unbind()
    x0, v = (x0 / 2).clamp(-1, 1), v.tanh()
    objective = Objective(levels)
    target = objective.target(x0, noise, indices)
    return {
        "mean_prediction": target + 0.1 * wrong,
        "variance_part": v,
        "sample": x0,
        "noisy": objective.add_noise(x0, noise, indices),
        "indices": indices,
    }


def brute_posterior(x0: Tensor, x: Tensor, index: int) -> Normal:
    """q(x_{i-1} | x_i, x0) as the product of two Gaussians in x_{i-1}: its prior given x0 and the
    likelihood of x_i (Bayes' rule, not the paper's formula)."""
    before = (1 - BETAS[:index]).prod()
    prior = Normal(before.sqrt() * x0, (1 - before).sqrt())
    step = (1 - BETAS[index]).sqrt()
    precision = 1 / prior.variance + step**2 / BETAS[index]
    mean = (prior.mean / prior.variance + step * x / BETAS[index]) / precision
    return Normal(mean, precision.rsqrt())


def brute_guess(kind: str, prediction: Tensor, x: Tensor, index: int) -> Tensor:
    alpha = (1 - BETAS[: index + 1]).prod().sqrt()
    sigma = (1 - alpha**2).sqrt()
    return {
        "epsilon": (x - sigma * prediction) / alpha,
        "v_prediction": alpha * x - sigma * prediction,
        "sample": prediction,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [1, 2, 6, 11])
def test_terms_are_the_kl_to_the_posterior(kind: str, index: int) -> None:
    levels = small_levels(kind)
    bound, b = VariationalBound(levels), batch(levels, torch.full((3,), index))
    true = brute_posterior(b["sample"], b["noisy"], index)
    guess = brute_guess(kind, b["mean_prediction"], b["noisy"], index)
    share = (b["variance_part"] + 1) / 2
    log_variance = share * BETAS[index].log() + (1 - share) * true.variance.log()
    model = Normal(brute_posterior(guess, b["noisy"], index).mean, (log_variance / 2).exp())
    expected = kl_divergence(true, model).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(bound.bits_per_dimension(**b), expected, atol=0, rtol=1e-9)
    torch.testing.assert_close(bound.loss(**b), 0.001 * 12 * expected, atol=0, rtol=1e-9)
    other = VariationalBound(levels, weight=0.25)
    torch.testing.assert_close(other.loss(**b), 0.25 * 12 * expected, atol=0, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_term_of_latents_is_a_kl_of_the_stand_in_variance(kind: str) -> None:
    levels = small_levels(kind)
    b = batch(levels, torch.zeros(3, dtype=torch.int64))
    stand_in = brute_posterior(b["sample"], b["noisy"], 1).variance
    share = (b["variance_part"] + 1) / 2
    log_variance = share * BETAS[0].log() + (1 - share) * stand_in.log()
    guess = brute_guess(kind, b["mean_prediction"], b["noisy"], 0)
    expected = kl_divergence(
        Normal(b["sample"], stand_in.sqrt()), Normal(guess, (log_variance / 2).exp())
    )
    torch.testing.assert_close(
        VariationalBound(levels).bits_per_dimension(**b),
        expected.flatten(1).mean(1) / math.log(2),
        atol=0,
        rtol=1e-9,
    )


@pytest.mark.parametrize("bins", [256, 16])
def test_the_first_term_of_pixels_is_the_likelihood_of_their_bins(bins: int) -> None:
    levels = small_levels()
    bound, b = VariationalBound(levels, bins=bins), batch(levels, torch.zeros(2, dtype=torch.int64))
    values = torch.arange(bins, dtype=torch.float64) * 2 / (bins - 1) - 1
    pixel = (torch.arange(b["sample"].numel()) * 7) % bins
    pixel[:4] = torch.tensor([0, bins - 1, 0, bins - 1])
    b["sample"] = values[pixel].view_as(b["sample"])
    guess = brute_guess("epsilon", b["mean_prediction"], b["noisy"], 0)
    model = Normal(guess, (bound.log_variance(b["variance_part"], b["indices"]) / 2).exp())
    edges = (values[1:] + values[:-1]) / 2
    cdf = torch.stack([model.cdf(edge.expand_as(guess)) for edge in edges])
    cdf = torch.cat([torch.zeros_like(cdf[:1]), cdf, torch.ones_like(cdf[:1])])
    masses = cdf.diff(dim=0)
    torch.testing.assert_close(masses.sum(0), torch.ones_like(guess), atol=1e-12, rtol=0)
    mass = masses.gather(0, pixel.view(1, *guess.shape))[0]
    bits = -bound_terms(bound, b) * math.log(2)
    seen = mass > 1e-9  # beyond, the difference of the oracle's cdfs has no digits
    assert float(seen.double().mean()) > 0.05
    torch.testing.assert_close(bits[seen], mass[seen].log(), atol=1e-6, rtol=1e-6)
    assert bool(bits.isfinite().all())


def bound_terms(bound: VariationalBound, b: dict[str, Tensor]) -> Tensor:
    """The term of every element by itself: each one as a sample of its own."""
    flat = {k: v.reshape(-1, 1, 1) for k, v in b.items() if k != "indices"}
    indices = b["indices"].repeat_interleave(b["sample"][0].numel())
    return bound.bits_per_dimension(**flat, indices=indices).view_as(b["sample"])


@pytest.mark.parametrize("schedule", ["linear", "sd", "cosine"])
def test_variances_are_those_of_the_scheduler(schedule: str) -> None:
    scheduler: Any = SCHEDULERS[schedule](variance_type="learned_range")
    bound = VariationalBound(levels_of(schedule))
    v = torch.tensor([-1.0, -0.4, 0.0, 0.9, 1.0])[None, :, None].double()
    for index in (1, 2, 10, 500, 998, 999):
        theirs = scheduler._get_variance(index, predicted_variance=v)
        ours = bound.log_variance(v, torch.tensor([index]))
        # 1 - abar_t / abar_t-1 has few digits in their float32
        torch.testing.assert_close(ours, theirs.double(), atol=2e-3, rtol=0)
    assert float(bound.log_variance(v, torch.tensor([0])).min()) == pytest.approx(
        float(scheduler._get_variance(1, predicted_variance=-torch.ones(1))), abs=2e-3
    )


def test_the_right_mean_and_variance_have_no_loss_left() -> None:
    levels = small_levels("v_prediction")
    indices = torch.arange(1, 12)
    b = batch(levels, indices)
    x0, x = b["sample"], b["noisy"]
    alpha = levels.alpha[indices].view(-1, 1, 1, 1)
    sigma = levels.sigma[indices].view(-1, 1, 1, 1)
    b |= {"mean_prediction": (alpha * x - x0) / sigma, "variance_part": -torch.ones_like(x0)}
    found = VariationalBound(levels).bits_per_dimension(**b)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-9, rtol=0)


@pytest.mark.parametrize("bins", [None, 256])
def test_only_the_variance_learns(bins: int | None) -> None:
    levels = levels_of("sd")
    b = batch(levels, torch.tensor([0, 1, 500, 999]))
    b = {k: v.float() if v.is_floating_point() else v for k, v in b.items()}
    output = torch.cat([b.pop("mean_prediction"), b.pop("variance_part")], 1).requires_grad_()
    bound = VariationalBound(levels, bins=bins)
    mean, variance = bound.split(output)
    loss = bound.loss(mean, variance, **b)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert output.grad is not None
    by_mean, by_variance = output.grad.chunk(2, dim=1)
    assert float(by_mean.abs().max()) == 0
    assert bool(by_variance.isfinite().all())
    assert bool((by_variance.abs().flatten(1).amax(1) > 0).all())


def test_training_the_variance_finds_that_of_the_data() -> None:
    """For a mean that is off by a fixed amount, the best variance is beta~ plus its square: the
    minimum over v, by gradient descent, against that closed form."""
    levels, index = small_levels("sample"), 6
    bound, indices = VariationalBound(levels), torch.tensor([index])
    x0 = torch.zeros(1, 1, 1, dtype=torch.float64)
    after, before = (1 - BETAS[: index + 1]).prod(), (1 - BETAS[:index]).prod()
    lower = (1 - before) / (1 - after) * BETAS[index]
    wanted = (lower + BETAS[index]) / 2
    scale = before.sqrt() * BETAS[index] / (1 - after)
    guess = ((wanted - lower).sqrt() / scale).view(1, 1, 1)
    v = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=50, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> float:
        optimizer.zero_grad()
        loss = 1e3 * bound.loss(guess, v, x0, x0, indices).sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    found = bound.log_variance(v.detach(), indices).exp()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_halves_of_channels() -> None:
    bound, output = VariationalBound(small_levels()), torch.arange(16.0).view(2, 4, 2)
    mean, variance = bound.split(output)
    assert torch.equal(mean, output[:, :2])
    assert torch.equal(variance, output[:, 2:])
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\) has no two halves"):
        bound.split(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    levels = levels_of("sd")
    b = batch(levels, torch.tensor([0, 3, 700]))
    low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()}
    high = {k: v.float() if v.is_floating_point() else v for k, v in low.items()}
    bound = VariationalBound(levels, bins=256)
    assert torch.equal(bound.loss(**low), bound.loss(**high))


def test_what_has_no_such_variance_is_refused() -> None:
    for name in ("flow", "edm"):
        with pytest.raises(ValueError, match=f"not for '{name}' on '{name}': train the mean alone"):
            VariationalBound(levels_of(name))
    zero = NoiseLevels.from_scheduler(
        diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="epsilon")
    )
    with pytest.raises(ValueError, match="zero terminal SNR: use v_prediction"):
        VariationalBound(zero)
    with_v = VariationalBound(zero.with_prediction_type("v_prediction"))
    assert bool(with_v.loss(**batch(with_v.levels, torch.tensor([0, 998, 999]))).isfinite().all())
    for weight in (0, math.inf):
        with pytest.raises(ValueError, match=f"weight={weight}"):
            VariationalBound(small_levels(), weight=weight)
    with pytest.raises(ValueError, match="bins=1 must be a whole number of at least 2"):
        VariationalBound(small_levels(), bins=1)
