"""What a network that minimises the loss predicts, turned into x0, is the posterior mean.

x0 is drawn from a mixture of two Gaussians, for which E[x0 | x] has a closed form. The best
prediction, E[target | x], is a ratio of two integrals over x0 of `Objective.target` at the noise
that leads from x0 to x; they are taken by Simpson's rule, so nothing here repeats the algebra by
which the library turns one target into another.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.objective import Objective

WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-0.8, 0.5]), np.array([0.15, 0.3])
TOLERANCE = 1e-6  # float64; what the tables of float32 leave of alpha^2 + sigma^2 = 1 is 1e-7
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, Any] = {
    "epsilon": lambda: diffusers.DDPMScheduler(**SD, clip_sample=False),
    "v_prediction": lambda: diffusers.DDPMScheduler(
        **SD, clip_sample=False, prediction_type="v_prediction"
    ),
    "sample": lambda: diffusers.DDPMScheduler(**SD, clip_sample=False, prediction_type="sample"),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": lambda: diffusers.EDMEulerScheduler(),
    "edm, -F": lambda: diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
}
ENDS = {"vp": (-5, 7), "flow": (-9, 10), "edm": (-8.7, 12)}


def objective_of(name: str) -> Objective:
    return Objective(NoiseLevels.from_scheduler(SCHEDULERS[name]()))


def posterior_mean(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x0 | x] in closed form: each component's conditional mean, by its responsibility."""
    spread = np.sqrt((alpha * STDS) ** 2 + sigma**2)
    logs = np.log(WEIGHTS) + stats.norm.logpdf(x[:, None], alpha * MEANS, spread)
    share = np.exp(logs - logs.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    means = MEANS + alpha * STDS**2 / spread**2 * (x[:, None] - alpha * MEANS)
    return (share * means).sum(1)


def best_prediction(objective: Objective, at: Tensor, x: np.ndarray, alpha: float, sigma: float):
    """E[target | x] at one noise level, by Simpson's rule over x0, for x (N,)."""
    found = []
    for value in x:
        # where both the data and the noise that leads to x are likely
        reach = 12 * sigma / max(alpha, 1e-9)
        low, high = max(-3.0, value / alpha - reach), min(3.0, value / alpha + reach)
        if low >= high:
            low, high = -3.0, 3.0
        x0 = np.linspace(low, high, 8001)
        noise = (value - alpha * x0) / sigma
        logs = stats.norm.logpdf(noise) + np.logaddexp(
            *(np.log(WEIGHTS[k]) + stats.norm.logpdf(x0, MEANS[k], STDS[k]) for k in (0, 1))
        )
        density = np.exp(logs - logs.max())
        pair = (torch.from_numpy(a)[:, None] for a in (x0, noise))
        target = objective.target(*pair, at.expand(len(x0)))[:, 0].numpy()  # pyright: ignore
        found.append(integrate.simpson(density * target, x=x0) / integrate.simpson(density, x=x0))
    return np.array(found)


def likely(alpha: float, sigma: float) -> np.ndarray:
    """Some x of the noisy mixture, from one tail to the other."""
    centres = alpha * MEANS[:, None] + np.sqrt((alpha * STDS[:, None]) ** 2 + sigma**2) * np.array(
        [-2.5, -1.0, 0.0, 0.7, 2.0]
    )
    return np.sort(centres.flatten())


def cases(objective: Objective) -> list[Tensor]:
    """Levels of the table, and levels between, over the range of log-SNR."""
    levels = objective.levels
    low, high = ENDS[levels.family]
    wanted = torch.linspace(low, high, 9, dtype=torch.float64)
    rising = levels.log_snr.flip(0).contiguous()
    nearest = len(levels) - 1 - torch.searchsorted(rising, wanted).clamp_max(len(levels) - 1)
    return [*nearest.unbind(), *(wanted.unbind() if levels.continuous else ())]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_optimum_of_the_trained_target_is_the_posterior_mean(name: str) -> None:
    objective = objective_of(name)
    log_snrs = []
    for at in cases(objective):
        alpha, sigma = (float(c) for c in objective.levels.coefficients(at))
        x = likely(alpha, sigma)
        prediction = best_prediction(objective, at, x, alpha, sigma)
        noisy, best = (torch.from_numpy(a)[:, None] for a in (x, prediction))
        found = objective.denoised(best, noisy, at.expand(len(x)))[:, 0].numpy()
        np.testing.assert_allclose(found, posterior_mean(x, alpha, sigma), rtol=0, atol=TOLERANCE)
        log_snrs.append(2 * np.log(alpha / sigma))
    assert np.ptp(log_snrs) > 11


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedulers_of_diffusers_read_the_optimum_the_same_way(name: str) -> None:
    """Sampling code turns the best prediction into the same x0, to its float32 tables' digits."""
    objective, scheduler = objective_of(name), SCHEDULERS[name]()
    levels = objective.levels
    for at in cases(objective):
        if at.is_floating_point():
            continue
        alpha, sigma = float(levels.alpha[at]), float(levels.sigma[at])
        x = likely(alpha, sigma)
        best = best_prediction(objective, at, x, alpha, sigma)
        found = theirs(scheduler, levels, int(at), *map(torch.from_numpy, (best, x)))
        np.testing.assert_allclose(found, posterior_mean(x, alpha, sigma), rtol=0, atol=2e-5)


def theirs(scheduler: Any, levels: NoiseLevels, index: int, best: Tensor, x: Tensor) -> np.ndarray:
    """The x0 that diffusers computes from a prediction in one step."""
    if levels.family == "vp":
        return scheduler.step(best[:, None], index, x[:, None]).pred_original_sample[:, 0].numpy()
    if levels.family == "edm":
        sigma = levels.sigma[index]
        return scheduler.precondition_outputs(x, best, sigma).numpy()
    # one Euler step from this level to sigma = 0 arrives at the x0 it believes in
    shift, sigma = scheduler.config.shift, float(levels.sigma[index])
    scheduler.set_timesteps(sigmas=[sigma / (shift - (shift - 1) * sigma)])
    return scheduler.step(best, scheduler.timesteps[0], x).prev_sample.numpy()


@pytest.mark.parametrize("name", ["edm", "edm, -F"])
def test_a_scheduler_step_to_no_noise_arrives_at_the_posterior_mean(name: str) -> None:
    """EDM's own sampling loop, from one level: scaled input, then a step to sigma = 0."""
    objective, scheduler = objective_of(name), SCHEDULERS[name]()
    scheduler.set_timesteps(sigmas=torch.tensor([1.0]))  # one step; its sigma is sigma_max
    sigma = float(scheduler.sigmas[0])
    at = -2 * torch.tensor(sigma, dtype=torch.float64).log()
    x = likely(1.0, sigma)
    best = torch.from_numpy(best_prediction(objective, at, x, 1.0, sigma))
    state = torch.from_numpy(x)
    scaled = scheduler.scale_model_input(state, scheduler.timesteps[0])
    ours = objective.scale_input(state[:, None], at.expand(len(x)))[:, 0]
    torch.testing.assert_close(scaled.double(), ours, atol=1e-6, rtol=1e-6)
    assert float(scheduler.timesteps[0]) == pytest.approx(
        float(objective.levels.conditioning(at)), rel=1e-6
    )
    stepped = scheduler.step(best, scheduler.timesteps[0], state).prev_sample
    np.testing.assert_allclose(stepped.numpy(), posterior_mean(x, 1.0, sigma), rtol=0, atol=2e-5)


def test_the_comparison_can_fail() -> None:
    """Another sigma_data, or another target's name, misses by far more than the tolerance."""
    right = objective_of("edm")
    other = Objective(NoiseLevels.from_scheduler(diffusers.EDMEulerScheduler(sigma_data=0.6)))
    negated = objective_of("edm, -F")
    at = torch.tensor(0.5, dtype=torch.float64)
    alpha, sigma = (float(c) for c in right.levels.coefficients(at))
    x = likely(alpha, sigma)
    best = torch.from_numpy(best_prediction(right, at, x, alpha, sigma))[:, None]
    noisy = torch.from_numpy(x)[:, None]
    for wrong in (other, negated):
        found = wrong.denoised(best, noisy, at.expand(len(x)))[:, 0].numpy()
        assert np.abs(found - posterior_mean(x, alpha, sigma)).max() > 1e-2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow", "edm"])
def test_a_network_free_fit_of_the_loss_finds_the_optimum(kind: str) -> None:
    """Least squares on samples of x, over bins of x, agrees with the integral: the target that is
    regressed is the one that is integrated."""
    objective = objective_of(kind)
    levels = objective.levels
    index = int((levels.log_snr - 1.0).abs().argmin())
    alpha, sigma = float(levels.alpha[index]), float(levels.sigma[index])
    rng, count = np.random.default_rng(0), 400_000
    part = rng.random(count) < WEIGHTS[1]
    x0 = np.where(part, *(MEANS[k] + STDS[k] * rng.standard_normal(count) for k in (1, 0)))
    pair = [torch.from_numpy(a)[:, None] for a in (x0, rng.standard_normal(count))]
    at = torch.full((count,), index)
    x = objective.add_noise(*pair, at)  # pyright: ignore
    target = objective.target(*pair, at)  # pyright: ignore
    for centre in (-0.5, 0.0, 0.6):
        near = (x[:, 0] - centre).abs() < 0.02
        assert int(near.sum()) > 1000
        # the constant that minimises the squared error there is the mean
        fitted, where = (part[near].mean(0, keepdim=True) for part in (target, x))
        found = float(objective.denoised(fitted, where, at[:1]))
        expected = posterior_mean(x[near, 0].numpy(), alpha, sigma).mean()
        error = x0[near.numpy()].std() / math.sqrt(int(near.sum()))
        assert abs(found - expected) < 5 * error
