"""compute_density_for_timestep_sampling: laws, orientation, ends, refusals."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import training_utils
from scipy import stats
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler, NoiseLevels, Slots, drop_in
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.drop_in import binding
from diffusers_curriculum.drop_in import names as official
from diffusers_curriculum.weighting import WEIGHTINGS
from tests.floors_fixtures import SCHEDULERS, levels_of, untouched_global_generators
from tests.statistics.checks import LAWS, counts_of, deviation, exact_cdf, kolmogorov

DRAWN = 100_000
OFFICIAL: dict[str, tuple[dict[str, Any], Any]] = {
    "none": ({}, stats.uniform().cdf),
    "sigma_sqrt": ({}, stats.uniform().cdf),
    "cosmap": ({}, stats.uniform().cdf),
    "logit_normal": ({"logit_mean": 0.5, "logit_std": 1.3}, None),
    "mode": ({"mode_scale": 1.29}, None),
}
SCHEDULES = ("flow", "flow_shift_3", "sd", "edm", "sd_zero_terminal")
SIGNIFICANCE = 1e-4 / (2 * len(OFFICIAL) + len(LAWS) * len(SCHEDULES))
# laws whose parameters have no default
PARAMETERS: dict[str, dict[str, Any]] = {
    "mixture": {"components": [{"density": "laplace", "weight": 2.0}, {"density": "normal"}]},
    "spline": {"points": [[-6.0, 0.0], [0.0, 1.0], [3.0, 0.2], [7.0, 0.0]]},
    "tabulated": {"log_snr": [-4.0, 0.0, 4.0], "density": [0.1, 1.0, 0.1]},
    "truncated": {"density": "laplace", "density_args": {"b": 2.0}, "low": -4.0, "high": 1.0},
}


def official_cdf(name: str) -> Any:
    """The law of diffusers' u, in closed form."""
    if name == "logit_normal":
        return lambda u: stats.norm(0.5, 1.3).cdf(np.log(u / (1 - u)))
    if name == "mode":  # u falls as w rises: P(u <= x) = 1 - w(x)
        w = np.linspace(0, 1, 1_000_001)
        u = 1 - w - 1.29 * (np.cos(np.pi * w / 2) ** 2 - 1 + w)
        return lambda x: 1 - np.interp(x, u[::-1], w[::-1])
    return OFFICIAL[name][1]


def draws(name: str, count: int = DRAWN, **options: Any) -> Tensor:
    return drop_in.compute_density_for_timestep_sampling(name, count, seed=5, step=0, **options)


def indices(u: Tensor, count: int) -> Tensor:
    """What the scripts compute."""
    return (u * count).long()


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL)
def test_diffusers_names_keep_diffusers_law(name: str) -> None:
    arguments, law = OFFICIAL[name][0], official_cdf(name)
    ours = draws(name, DRAWN, **arguments).double().numpy()
    theirs = training_utils.compute_density_for_timestep_sampling(
        name, DRAWN, **arguments, generator=torch.Generator().manual_seed(0)
    )
    assert stats.kstest(ours, law).pvalue > SIGNIFICANCE
    assert stats.kstest(theirs.double().clamp(0, 1).numpy(), law).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", LAWS)
def test_steps_follow_the_law_of_log_snr(name: str, schedule: str) -> None:
    scheduler, levels = SCHEDULERS[schedule](), levels_of(schedule)
    arguments: dict[str, Any] = dict(LAWS[name][0])
    u = draws(f"density:{name}", scheduler=scheduler, floor=0.0, **arguments)
    counts = counts_of(len(levels) - 1 - indices(u, len(levels)), len(levels))
    if schedule == "sd_zero_terminal" and name != "uniform":  # all below the last finite edge
        edges = levels.edges.clone()
        edges[-1] = -500
        assert kolmogorov(counts, exact_cdf(name, edges)) > SIGNIFICANCE
    else:
        assert kolmogorov(counts, exact_cdf(name, levels.edges)) > SIGNIFICANCE


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_steps_have_the_masses_of_the_sampler(name: str, schedule: str) -> None:
    scheduler = SCHEDULERS[schedule]()
    arguments = PARAMETERS.get(name, DENSITIES.entry(name).example)
    sampler = DensityTimestepSampler(scheduler, name, arguments)  # floor 0.1 in both
    u = draws(f"density:{name}", scheduler=scheduler, draw="stratified", **arguments)
    count = len(sampler.levels)
    counts = counts_of(count - 1 - indices(u, count), count)
    # one stratum straddles each edge
    assert deviation(counts, sampler.probabilities().numpy()) <= 1.001


def test_the_default_floor_is_a_tenth() -> None:
    far = draws("laplace", mu=0.0, b=0.5)
    beyond = float(((far < 0.1) | (far >= 0.9)).double().mean())  # |log-SNR| > 4.39
    assert beyond == pytest.approx(0.1 * 0.2, abs=0.003)
    assert float(((draws("laplace", floor=0.0) - 0.5).abs() > 0.4).double().mean()) < 0.001


def test_within_a_step_u_is_uniform() -> None:
    inside = draws("laplace").double() * 1000 % 1
    assert 9e-4 < float(inside.min()) < 2e-3
    assert stats.kstest(inside.numpy(), stats.uniform(1e-3, 1 - 2e-3).cdf).pvalue > 1e-4


# -- orientation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift": 6.0}]
)
def test_a_sampler_s_timesteps_are_found_by_the_scripts(settings: Any) -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    sampler = DensityTimestepSampler(scheduler, "uniform", draw="stratified")
    timesteps = sampler.sample(1000).timesteps  # looked up by equality, see get_sigmas
    assert torch.equal(timesteps.sort(descending=True).values, scheduler.timesteps)


@pytest.mark.parametrize("schedule", ["flow", "flow_shift_3"])
def test_mirrored_convention_for_flow_schedulers(schedule: str) -> None:
    scheduler = SCHEDULERS[schedule]()
    for mu in (-3.0, 3.0):
        u = draws("laplace", 1000, scheduler=scheduler, floor=0.0, mu=mu, b=0.1)
        sigmas = scheduler.sigmas[indices(u, 1000)].double()  # as the scripts look them up
        assert float((2 * torch.log((1 - sigmas) / sigmas)).mean()) == pytest.approx(mu, abs=0.05)


def test_a_positive_logit_mean_favours_clean_levels_as_in_diffusers() -> None:
    theirs = training_utils.compute_density_for_timestep_sampling(
        "logit_normal", 1000, 2.0, 0.1, generator=torch.Generator().manual_seed(0)
    )
    ours = draws("logit_normal", 1000, logit_mean=2.0, logit_std=0.1)
    assert float(ours.mean()) == pytest.approx(float(theirs.mean()), abs=0.01)
    assert float(ours.mean()) == pytest.approx(1 / (1 + np.exp(-2)), abs=0.01)


def test_reversed_sigmas_follow_the_law_of_the_data_they_multiply() -> None:
    scheduler = SCHEDULERS["flow_shift_3"]()
    laws = drop_in.for_scheduler(scheduler, reversed_sigmas=True)
    u = laws.compute_density_for_timestep_sampling(
        "laplace", 1000, mu=2.0, b=0.1, floor=0.0, seed=0
    )
    alpha = scheduler.sigmas[indices(u, 1000)].double()  # x = sigma x0 + (1 - sigma) noise
    assert float((2 * torch.log(alpha / (1 - alpha))).mean()) == pytest.approx(2.0, abs=0.05)
    weights = laws.compute_loss_weighting_for_sd3("debiased", torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(weights, torch.tensor([0.09, 0.09]))
    sample = laws.compute_loss_weighting_for_sd3(
        "debiased", torch.tensor([0.1, 0.9]), prediction_type="sample"
    )
    torch.testing.assert_close(sample, torch.tensor([1 / 9, 9.0]))


def test_reversed_sigmas_are_refused_without_flow_matching() -> None:
    with pytest.raises(ValueError, match="this schedule is 'vp'"):
        drop_in.for_scheduler(SCHEDULERS["sd"](), reversed_sigmas=True)


# -- ends ------------------------------------------------------------------------------------------


@pytest.fixture
def extreme_uniforms(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    w = torch.tensor([0.0, 2.0**-53, 1e-9, 0.5, 1 - 1e-9, 1 - 2.0**-53], dtype=torch.float64)
    monkeypatch.setattr(binding, "batch_uniforms", lambda *args, **kwargs: w)
    return w


def test_clipped_last_timestep(extreme_uniforms: Tensor) -> None:
    # diffusers' own law ends on the index that does not exist, in float32
    assert int(indices(official.mode(extreme_uniforms, 1.29).float(), 1000).max()) == 1000
    assert int(indices(extreme_uniforms.float(), 1000).max()) == 1000
    names = {**{name: arguments for name, (arguments, _) in OFFICIAL.items()}, "laplace": {}}
    for name, arguments in names.items():
        u = draws(name, 6, **arguments)
        assert u.dtype == torch.float32
        for count in (3, 10, 999, 1000, 1024, 4000):
            at = indices(u, count)
            assert 0 <= int(at.min()) <= int(at.max()) <= count - 1, name
        assert int(indices(u, 1000).max()) == 999  # and the last one is reached
        assert int(indices(u, 1000).min()) == 0


@pytest.mark.parametrize("count", [3, 7, 1000, 4000, 100_000])
def test_float32_arithmetic_of_the_scripts_never_moves_a_step(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=count)
    steps = torch.arange(count, dtype=torch.float64).repeat_interleave(3)
    inside = torch.tensor([1e-6, 0.5, 1 - 1e-6], dtype=torch.float64).repeat(count)
    monkeypatch.setattr(binding, "batch_uniforms", lambda *args, **kwargs: (steps + inside) / count)
    u = drop_in.for_scheduler(scheduler).compute_density_for_timestep_sampling("uniform", 3)
    assert torch.equal(count - 1 - indices(u, count), steps.long())


def test_a_step_begins_where_the_one_before_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1024)
    w = torch.arange(1024, dtype=torch.float64) / 1024  # binary fractions: the cdf is exact
    monkeypatch.setattr(binding, "batch_uniforms", lambda *args, **kwargs: w)
    u = drop_in.for_scheduler(scheduler).compute_density_for_timestep_sampling("uniform", 1024)
    assert torch.equal(1023 - indices(u, 1024), torch.arange(1024))


# -- randomness ------------------------------------------------------------------------------------


def test_the_global_generators_are_left_alone() -> None:
    with untouched_global_generators():
        drop_in.compute_density_for_timestep_sampling("laplace", 4)
        drop_in.compute_density_for_timestep_sampling("mode", 4, mode_scale=1.0)


def test_calls_are_counted_and_a_seed_repeats_them() -> None:
    def three(seed: int) -> Tensor:
        laws = drop_in.for_scheduler()
        return torch.stack(
            [laws.compute_density_for_timestep_sampling("none", 4, seed=seed) for _ in range(3)]
        )

    assert torch.equal(three(1), three(1))
    assert len(torch.cat([three(1), three(2)]).unique()) == 24
    again = drop_in.for_scheduler().compute_density_for_timestep_sampling("none", 4, seed=1, step=2)
    assert torch.equal(again, three(1)[2])


def test_the_script_s_own_seed_is_followed() -> None:
    def first() -> Tensor:
        return drop_in.for_scheduler().compute_density_for_timestep_sampling("none", 4)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        one = first()
        torch.rand(5)
        assert torch.equal(first(), one)
        torch.manual_seed(4)
        assert not torch.equal(first(), one)


def test_a_generator_is_used_up() -> None:
    def draw(generator: torch.Generator) -> Tensor:
        return drop_in.compute_density_for_timestep_sampling("none", 4, generator=generator)

    generator = torch.Generator().manual_seed(0)
    first, second = draw(generator), draw(generator)
    assert not torch.equal(first, second)
    assert torch.equal(draw(torch.Generator().manual_seed(0)), first)


def test_slots_share_out_one_global_batch() -> None:
    whole = draws("laplace", 8, draw="stratified")
    parts = [draws("laplace", Slots(start, 4, 8), draw="stratified") for start in (0, 4)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat(parts), whole)


def test_without_a_scheduler_the_grid_is_that_of_unshifted_flow_matching() -> None:
    plain = draws("laplace", scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    assert torch.equal(draws("laplace"), plain)
    assert not torch.equal(draws("laplace", scheduler=SCHEDULERS["flow_shift_3"]()), plain)


def test_the_draw_and_the_device_are_those_asked_for() -> None:
    even = draws("none", 1000, draw="stratified")
    assert torch.equal(indices(even, 1000).sort().values, torch.arange(1000))
    assert draws("none", 4, device="cpu").device == torch.device("cpu")
    assert draws("none", 4, device="meta").device == torch.device("meta")


def test_the_schedule_s_own_tables_are_read_once() -> None:
    scheduler = SCHEDULERS["flow"]()
    first = draws("laplace", 8, scheduler=scheduler)
    scheduler.set_timesteps(7)
    assert torch.equal(draws("laplace", 8, scheduler=scheduler), first)
    assert len(NoiseLevels.from_scheduler(scheduler)) == 1000


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["laplce", "", "density:none", "weighting:laplace", "None"])
def test_unknown_names_are_refused_with_the_list(name: str) -> None:
    for function in (
        lambda: drop_in.compute_density_for_timestep_sampling(name, 4),
        lambda: drop_in.compute_loss_weighting_for_sd3(name, torch.ones(1)),
    ):
        with pytest.raises(ValueError, match=r"is unknown: choose from .*laplace.*min_snr"):
            function()


@pytest.mark.parametrize("name", sorted(set(WEIGHTINGS) - set(DENSITIES) - set(OFFICIAL)))
def test_a_loss_weighting_is_drawn_uniformly(name: str) -> None:
    assert torch.equal(draws(name, 64), draws("none", 64))
    assert torch.equal(draws(f"weighting:{name}", 64), draws("none", 64))


def test_a_name_of_both_kinds_must_say_which() -> None:
    WEIGHTINGS.register("laplace")(WEIGHTINGS["min_snr"])
    try:
        with pytest.raises(ValueError, match="say 'density:laplace' or 'weighting:laplace'"):
            draws("laplace", 4)
        assert not torch.equal(draws("density:laplace", 4), draws("weighting:laplace", 4))
    finally:
        WEIGHTINGS.remove("laplace")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("logit_normal", {}, "needs a finite logit_mean .got None."),
        ("logit_normal", {"logit_mean": 0.0, "logit_std": 0.0}, "logit_std greater than 0"),
        ("logit_normal", {"logit_mean": float("nan"), "logit_std": 1.0}, "got nan"),
        ("mode", {}, "mode_scale from -1.0 to 1.7519 .got None."),
        ("mode", {"mode_scale": 1.76}, "got 1.76"),
        ("mode", {"mode_scale": -1.01}, "got -1.01"),
        ("none", {"mu": 0.0}, "takes no parameter 'mu'"),
        ("mode", {"mode_scale": 1.0, "floor": 0.1}, "takes no parameter 'floor'"),
        ("laplace", {"width": 1.0}, "no parameter 'width'"),
        ("laplace", {"floor": 1.1}, "floor=1.1 must lie in"),
        ("laplace", {"mu": 1e4, "b": 0.1, "floor": 0.0}, "no mass"),
        ("laplace", {"mu": torch.ones(1)}, "plain numbers"),
        ("laplace", {"draw": "halton"}, "'halton' is unknown"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draws(name, 4, **options)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_the_mode_law_stays_in_its_interval(scale: float) -> None:
    w = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    u = official.mode(w, scale)
    assert bool((u.diff() <= 1e-12).all())
    assert float(u.min()) >= -1e-12
    assert float(u.max()) <= 1 + 1e-12
