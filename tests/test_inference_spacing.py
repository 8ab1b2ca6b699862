"""Inference schedules that follow a law, and that they still end at the data.

The denoiser is exact: for data N(m, s2) the mean of x0 given x = a x0 + b noise is
(a s2 x + b^2 m) / (a^2 s2 + b^2). All solvers here are then affine in x, so three starting points
tell mean and variance of what comes out of N(0, 1) without any drawing.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_curriculum import (
    CurriculumTimestepSampler,
    DensityTimestepSampler,
    NoiseLevels,
    TimestepSampler,
)
from diffusers_curriculum.inference_spacing import (
    HARDLY_TRAINED,
    InferenceSpacing,
    fit_inference,
    law_indices,
    trained_share,
    visited_indices,
)
from tests.floors_fixtures import SCHEDULERS, SD, levels_of

MEAN, VARIANCE = 0.7, 0.6
KINDS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
}


def _make(name: str, **config: Any) -> Any:
    clip = {"clip_sample": False} if name == "ddim" else {}
    return KINDS[name](**(SD | clip | config))


SOLVERS = {name: partial(_make, name) for name in KINDS}


def sampler_for(scheduler: Any, density: str = "laplace", floor: float = 0.1) -> TimestepSampler:
    training = scheduler
    if "shift" not in scheduler.config:
        training = diffusers.DDPMScheduler.from_config(scheduler.config)
    return DensityTimestepSampler.from_scheduler(training, density=density, floor=floor)


def denoise(scheduler: Any, start: Tensor | None = None) -> tuple[float, float]:
    """Mean and variance of what ``scheduler`` makes of N(0, 1) (or of the affine ``start``)."""
    levels = NoiseLevels.from_scheduler(scheduler)
    kind = levels.prediction_type
    x = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64) if start is None else start
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        level = int((levels.timesteps.double() - t.double()).abs().argmin())
        a, b = float(levels.alpha[level]), float(levels.sigma[level])
        x0 = (a * VARIANCE * seen + b * b * MEAN) / (a * a * VARIANCE + b * b)
        noise = (seen - a * x0) / b
        output = {"epsilon": noise, "v_prediction": a * noise - b * x0, "flow": noise - x0}[kind]
        x = scheduler.step(output, t, x, return_dict=False)[0].double()
    return float(x[0]), float(((x[1] - x[2]) / 2) ** 2)


# -- which levels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "linear", "cosine", "flow", "edm"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_levels_stand_at_the_quantiles_of_the_mass(name: str, steps: int) -> None:
    levels = levels_of(name)
    mass = DensityTimestepSampler.from_scheduler(
        SCHEDULERS[name](), density="normal", floor=0.1
    ).probabilities()
    indices = law_indices(levels, mass, steps).numpy()
    cdf = np.append(0, mass.numpy().cumsum())
    for i, index in enumerate(indices[::-1]):
        assert cdf[index] - 1e-9 <= (i + 0.5) / steps <= cdf[index + 1] + 1e-9


def test_the_quantiles_are_those_of_the_law_in_log_snr() -> None:
    # Laplace(0, 0.5), cut where the levels are hardly trained: F(l) = exp(2 l) / 2 for l < 0
    sampler = sampler_for(SOLVERS["euler"](), floor=0.0)
    fit = fit_inference(SOLVERS["euler"](), sampler, 20, cover=0)
    trained = sampler.probabilities() * 1000 >= HARDLY_TRAINED
    low, high = (f(sampler.levels.log_snr[trained]) for f in (torch.min, torch.max))
    first, last = np.exp(2 * float(low)) / 2, 1 - np.exp(-2 * float(high)) / 2
    p = first + (np.arange(20) + 0.5) / 20 * (last - first)
    expected = np.where(p < 0.5, 0.5 * np.log(2 * p), -0.5 * np.log(2 * (1 - p)))
    np.testing.assert_allclose(fit.log_snr.numpy(), expected, atol=0.01)


@pytest.mark.parametrize("cover", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 10, 400, 999, 1000])
def test_levels_are_different_and_fall_in_noise(cover: float, steps: int) -> None:
    levels = levels_of("sd")
    sampler = DensityTimestepSampler.from_scheduler(SCHEDULERS["sd"](), density="laplace")
    indices = law_indices(levels, sampler.probabilities(), steps, cover=cover)
    assert indices.shape == (steps,)
    assert bool((indices.diff() < 0).all())
    assert 0 <= int(indices[-1]) <= int(indices[0]) <= 999
    if cover:
        assert (int(indices[-1]), int(indices[0])) == (0, 999)


def test_full_cover_is_even_in_log_snr() -> None:
    levels = levels_of("sd")
    indices = law_indices(levels, torch.full((1000,), 1e-3, dtype=torch.float64), 20, cover=1.0)
    gaps = levels.log_snr[indices].diff()
    even = float(levels.log_snr[0] - levels.log_snr[-1]) / 19
    np.testing.assert_allclose(gaps.numpy(), even, rtol=0.4)
    assert float(gaps[:12].max() / gaps[:12].min()) < 1.1  # where levels are dense


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cover", [0.0, 0.5])
def test_what_is_hardly_trained_is_never_visited(solver: str, cover: float) -> None:
    scheduler = SOLVERS[solver]()
    sampler = sampler_for(scheduler, floor=0.0)
    share = sampler.probabilities() * 1000
    assert bool((share < HARDLY_TRAINED).any())
    fit = fit_inference(scheduler, sampler, 40, cover=cover)
    assert bool((share[fit.indices] >= HARDLY_TRAINED).all())


def test_no_start_without_signal_unless_it_is_trained() -> None:
    scheduler = SOLVERS["dpm"](rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with_floor = fit_inference(scheduler, sampler_for(scheduler), 20)
    without = fit_inference(scheduler, sampler_for(scheduler, floor=0.0), 20)
    assert int(with_floor.indices[0]) == 999
    assert float(without.log_snr[0]) > -4
    epsilon = SOLVERS["dpm"](rescale_betas_zero_snr=True)
    assert int(fit_inference(epsilon, sampler_for(epsilon), 20).indices[0]) == 998


def test_a_start_inside_the_signal_is_told(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = SOLVERS["euler"]()
    with caplog.at_level(logging.WARNING, "diffusers_curriculum.inference_spacing"):
        fit_inference(scheduler, sampler_for(scheduler), 20)
        assert not caplog.records
        fit = fit_inference(scheduler, sampler_for(scheduler), 20, cover=0)
    (record,) = caplog.records
    signal = 100 / (1 + np.exp(-float(fit.log_snr[0])))
    assert f"{signal:.0f} % of the state" in record.getMessage()


def test_a_curriculum_is_taken_at_its_end() -> None:
    scheduler = SOLVERS["euler"]()
    sampler = sampler_for(scheduler)
    curriculum = CurriculumTimestepSampler(sampler, clusters=5)
    fit, plain = (fit_inference(scheduler, s, 30) for s in (curriculum, sampler))
    assert fit.indices.tolist() == plain.indices.tolist()
    first = fit_inference(scheduler, curriculum, 30, mass=curriculum.probabilities(0))
    assert int(first.indices.min()) == int(curriculum.open_levels(1).nonzero().min())


# -- the schedulers --------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scheduler_takes_the_schedule_as_it_is(solver: str) -> None:
    scheduler = SOLVERS[solver]()
    before = dict(scheduler.config)
    fit = fit_inference(scheduler, sampler_for(scheduler), 25)
    assert fit.scheduler.timesteps.tolist() == fit.indices.tolist()
    again = type(fit.scheduler).from_config(fit.scheduler.config)
    again.set_timesteps(**fit.arguments)
    torch.testing.assert_close(again.timesteps, fit.scheduler.timesteps)
    assert dict(scheduler.config) == before
    assert scheduler.num_inference_steps is None  # the one passed in stays unused
    levels = NoiseLevels.from_scheduler(scheduler)
    if solver != "ddim":
        expected = (levels.sigma / levels.alpha)[fit.indices]
        torch.testing.assert_close(
            fit.scheduler.sigmas[:-1].double(), expected, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_not_shifted_twice(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)  # type: ignore[call-arg]
    sampler = sampler_for(scheduler, "normal")
    fit = fit_inference(scheduler, sampler, 25)
    sigma = sampler.levels.sigma[fit.indices]
    torch.testing.assert_close(fit.scheduler.sigmas[:-1].double(), sigma, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", [True, False])
def test_the_twin_of_ddim_makes_the_steps_of_ddim(last: bool) -> None:
    ddim = SOLVERS["ddim"](timestep_spacing="trailing", set_alpha_to_one=last)
    ddim.set_timesteps(50)
    uniform = sampler_for(ddim, "uniform", 0.0)
    twin: Any = fit_inference(ddim, uniform, 50).scheduler
    twin.set_timesteps(timesteps=ddim.timesteps.tolist())
    np.testing.assert_allclose(denoise(twin), denoise(ddim), rtol=1e-5)


# -- where it ends ---------------------------------------------------------------------------------


def end(fit: InferenceSpacing) -> tuple[float, float]:
    return denoise(fit.scheduler)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("density", ["laplace", "normal", "cosine"])
def test_with_enough_steps_it_ends_at_the_data(solver: str, density: str) -> None:
    # v prediction on zero terminal SNR: pure noise is the true start, so nothing else is off
    scheduler = SOLVERS[solver](rescale_betas_zero_snr=True, prediction_type="v_prediction")
    sampler = sampler_for(scheduler, density)
    few, many = (end(fit_inference(scheduler, sampler, steps)) for steps in (50, 400))
    assert few[0] == pytest.approx(MEAN, abs=1e-3)
    assert many[0] == pytest.approx(MEAN, abs=1e-3)
    assert few[1] == pytest.approx(VARIANCE, abs=0.06)
    # Eight times the steps: an eighth of the error, for a solver of first order. What the last
    # step takes in one go, from the cleanest level to none, remains.
    assert abs(many[1] - VARIANCE) < max(1e-3, abs(few[1] - VARIANCE) / 6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_ends_at_the_data(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)  # type: ignore[call-arg]
    mean, variance = end(fit_inference(scheduler, sampler_for(scheduler, "normal"), 400))
    assert mean == pytest.approx(MEAN, abs=1e-3)
    assert variance == pytest.approx(VARIANCE, abs=0.007)


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_a_narrow_law_needs_the_cover(solver: str) -> None:
    # the law alone leaves its tails to a few long steps
    scheduler = SOLVERS[solver](rescale_betas_zero_snr=True, prediction_type="v_prediction")
    sampler = sampler_for(scheduler, "laplace")
    covered, alone = (
        end(fit_inference(scheduler, sampler, 50, cover=cover)) for cover in (0.5, 0.0)
    )
    assert abs(covered[1] - VARIANCE) < 0.6 * abs(alone[1] - VARIANCE)


# -- which levels a scheduler visits ---------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_visited_levels_of_a_scheduler(spacing: str) -> None:
    scheduler = SOLVERS["euler"](timestep_spacing=spacing)
    visited = visited_indices(scheduler, levels_of("sd"), 20).numpy()
    expected = {
        "leading": np.arange(20) * 50,
        "trailing": np.arange(1, 21) * 50 - 1,
        "linspace": np.linspace(0, 999, 20),
    }[spacing]
    np.testing.assert_allclose(visited, expected, atol=0.5)
    assert scheduler.num_inference_steps is None


def test_visited_levels_of_flow_matching() -> None:
    levels = levels_of("flow_shift_3")
    visited = visited_indices(SCHEDULERS["flow_shift_3"](), levels, 10)
    scheduler = SCHEDULERS["flow_shift_3"]()
    scheduler.set_timesteps(10)
    wanted = scheduler.timesteps.flip(0).double()
    torch.testing.assert_close(levels.timesteps[visited].double(), wanted, atol=1.6, rtol=0)


def test_trained_share_by_hand() -> None:
    mass = torch.tensor([0.1, 0.1, 0.3, 0.3, 0.2, 0.0], dtype=torch.float64)
    # visited 1 and 4: levels 0 to 2 are nearest to the first, 3 to 5 to the second
    share = trained_share(mass, torch.tensor([1, 4]))
    torch.testing.assert_close(share, torch.tensor([1.0, 1.0], dtype=torch.float64))
    share = trained_share(mass, torch.tensor([0, 2, 5]))
    expected = torch.tensor([0.1, 0.7 / 3, 0.1], dtype=torch.float64) * 6
    torch.testing.assert_close(share, expected)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, 1001])
def test_a_number_of_steps_that_cannot_be(steps: Any) -> None:
    scheduler = SOLVERS["euler"]()
    with pytest.raises(
        ValueError, match=r"steps=.* (whole number of at least 1|more than the 1000 levels)"
    ):
        fit_inference(scheduler, sampler_for(scheduler), steps)


def test_more_steps_than_trained_levels() -> None:
    scheduler = SOLVERS["euler"]()
    sampler = sampler_for(scheduler, floor=0.0)
    trained = int((sampler.probabilities() * 1000 >= HARDLY_TRAINED).sum())
    assert len(fit_inference(scheduler, sampler, trained).indices) == trained
    with pytest.raises(
        ValueError, match=f"more than the {trained} levels that are trained: ask for fewer"
    ):
        fit_inference(scheduler, sampler, trained + 1)


@pytest.mark.parametrize("cover", [-0.1, 1.5, float("nan")])
def test_a_cover_out_of_range(cover: float) -> None:
    scheduler = SOLVERS["euler"]()
    with pytest.raises(ValueError, match="must lie in"):
        fit_inference(scheduler, sampler_for(scheduler), 5, cover=cover)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SOLVERS["ddim"](clip_sample=True), "clip_sample=False"),
        (lambda: diffusers.PNDMScheduler(**SD), "takes no custom timesteps: use DDIM"),  # type: ignore[arg-type]
        (lambda: SOLVERS["euler"](use_karras_sigmas=True), "use_karras_sigmas"),
        (lambda: SOLVERS["dpm"](use_karras_sigmas=True), "use_karras_sigmas"),
        (lambda: diffusers.DDIMScheduler(clip_sample=False), "other noise levels"),  # type: ignore[call-arg]
    ],
)
def test_schedulers_that_cannot(make: Any, message: str) -> None:
    sampler = sampler_for(SOLVERS["euler"]())
    with pytest.raises(ValueError, match=message):
        fit_inference(make(), sampler, 10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dynamic_shifting": True}, "fixed shift"),
        ({"shift_terminal": 0.1}, "terminal"),
        ({"use_karras_sigmas": True}, "karras"),
    ],
)
def test_flow_schedulers_that_cannot(config: dict[str, Any], message: str) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    with pytest.raises(ValueError, match=message):
        fit_inference(scheduler, sampler_for(scheduler, "normal"), 10)
