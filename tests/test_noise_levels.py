"""The tables read from schedulers, against the schedules' closed forms and diffusers itself."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import diffusers.schedulers
import pytest
import torch
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels, cell_edges
from diffusers_curriculum.objective import Objective
from tests.floors_fixtures import SCHEDULERS, SD, VARIANCE_PRESERVING, levels_of

AT = [0, 1, 10, 100, 250, 500, 750, 900, 990, 998, 999]
LOG_SNR = {
    "linear": "9.2102 8.4221 6.1201 2.1444 0.0857 -2.4727 -5.7105"
    " -8.2159 -9.9366 -10.0975 -10.1177",
    "sd": "7.0694 6.3731 4.6396 2.1346 0.7254 -0.9627 -2.8216 -4.2437 -5.2555 -5.3519 -5.3640",
    "cosine": "10.0950 9.3447 7.2340 3.5317 1.7027 -0.0309 -1.7891"
    " -3.7219 -8.5335 -12.9281 -19.8359",
}
NEAREST_TO_ZERO = {"linear": 258, "sd": 354, "cosine": 495}
# 5, 25, 50, 75, 95 % of log-SNR under uniform timesteps: ascending order statistic ceil(1000 q)
UNIFORM_QUANTILES = {
    "linear": [-9.152, -5.710, -2.473, 0.086, 3.474],
    "sd": [-4.790, -2.822, -0.963, 0.725, 2.978],
    "cosine": [-5.141, -1.789, -0.031, 1.703, 4.786],
}

# Every scheduler of diffusers that has a table of training levels, by family. A later version may
# add some; losing one is a regression.
SUPPORTED = {
    "vp": [
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "RePaintScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
        "UniPCMultistepScheduler",
    ],
    "flow": [
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeliosDMDScheduler",
        "HeliosScheduler",
    ],
    "edm": [
        "CMStochasticIterativeScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "ScoreSdeVeScheduler",
    ],
}
NEWER = {"FlowMapEulerDiscreteScheduler"}  # than the oldest diffusers that is allowed
EXPORTED = sorted(n for n in dir(diffusers.schedulers) if n.endswith("Scheduler"))


def _needs_arguments(kind: type) -> bool:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize("name", sorted(LOG_SNR))
def test_log_snr_of_the_three_usual_schedules(name: str) -> None:
    levels = levels_of(name)
    expected = torch.tensor([float(v) for v in LOG_SNR[name].split()], dtype=torch.float64)
    assert levels.log_snr.dtype == torch.float64
    torch.testing.assert_close(levels.log_snr[AT], expected, atol=6e-4, rtol=0)
    assert int(levels.log_snr.abs().argmin()) == NEAREST_TO_ZERO[name]
    ascending = levels.log_snr.flip(0)[[49, 249, 499, 749, 949]]
    quantiles = torch.tensor(UNIFORM_QUANTILES[name], dtype=torch.float64)
    torch.testing.assert_close(ascending, quantiles, atol=6e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "largest", "at", "smallest", "smallest_at"),
    [
        ("linear", 0.7882, 0, 0.009915, 348),
        ("sd", 0.6963, 0, 0.006548, 421),
        ("cosine", 6.9078, 998, 0.006234, 495),
    ],
)
def test_steps_of_log_snr(
    name: str, largest: float, at: int, smallest: float, smallest_at: int
) -> None:
    steps = -levels_of(name).log_snr.diff()
    assert int(steps.argmax()) == at
    assert float(steps.max()) == pytest.approx(largest, abs=6e-4)
    # float32 tables blur steps of 0.006 at the seventh digit, so neighbours may tie
    assert int(steps.argmin()) == pytest.approx(smallest_at, abs=3)
    assert float(steps.min()) == pytest.approx(smallest, abs=2e-6)


def test_log_snr_is_that_of_the_float32_table_in_float64() -> None:
    scheduler = SCHEDULERS["cosine"]()
    power = scheduler.alphas_cumprod.double()
    ideal = power.log() - torch.log1p(-power)
    torch.testing.assert_close(levels_of("cosine").log_snr, ideal, atol=0, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_families_and_the_orientation(name: str) -> None:
    levels = levels_of(name)
    family = {"flow": "flow", "flow_shift_3": "flow", "edm": "edm"}.get(name, "vp")
    assert levels.family == family
    assert len(levels) == len(levels.edges) - 1 == len(levels.timesteps)
    sums = {"vp": levels.alpha**2 + levels.sigma**2, "flow": levels.alpha + levels.sigma}
    total = sums.get(family, levels.alpha)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-7, rtol=0)
    expected = 2 * (levels.alpha / levels.sigma).log()
    torch.testing.assert_close(levels.log_snr, expected, atol=1e-6, rtol=1e-6)
    # a higher log-SNR is a cleaner sample, for every family
    noise_share = levels.sigma / (levels.alpha**2 + levels.sigma**2).sqrt()
    assert bool((levels.log_snr.diff() < 0).all())
    assert bool((noise_share.diff() > 0).all())
    assert levels.prediction_type == {"vp": "epsilon"}.get(family, family)
    assert levels.continuous == (family != "vp")
    assert levels.sigma_data == (0.5 if family == "edm" else None)


def test_flow_matching_levels_and_their_timesteps() -> None:
    levels = levels_of("flow")
    sigma = levels.sigma
    for value, log_snr in [(0.001, 13.8135), (0.25, 2.1972), (0.5, 0.0), (0.999, -13.8135)]:
        at = round(value * 1000) - 1
        assert float(sigma[at]) == pytest.approx(value, abs=1e-7)
        # sigma is float32: 6e-8 of rounding is 6e-5 of 1 - sigma at sigma = 0.999
        assert float(levels.log_snr[at]) == pytest.approx(log_snr, abs=2e-4)
    assert float(levels.log_snr[-1]) == -torch.inf
    assert levels.timesteps.dtype == torch.float32
    assert float(levels.timesteps[0]) == pytest.approx(1.0)
    assert float(levels.timesteps[-1]) == 1000.0


def test_shifted_flow_timesteps_are_not_rounded() -> None:
    levels = levels_of("flow_shift_3")
    assert levels.timesteps.dtype == torch.float32
    assert float(levels.timesteps[-2]) == pytest.approx(999.6664, abs=1e-3)


@pytest.mark.parametrize("shift", [3.0, 1 / 3, 1.6487])
def test_a_shift_moves_log_snr_by_minus_two_log_shift(shift: float) -> None:
    plain = levels_of("flow")
    shifted = NoiseLevels.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))
    finite = plain.finite & shifted.finite
    assert finite.sum() == 999
    moved = plain.log_snr[finite] - 2 * torch.tensor(shift, dtype=torch.float64).log()
    torch.testing.assert_close(shifted.log_snr[finite], moved, atol=4e-4, rtol=0)


def test_shift_three_of_a_few_sigmas() -> None:
    plain, shifted = levels_of("flow"), levels_of("flow_shift_3")
    for before, after in [(0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.9), (0.9, 0.964286)]:
        at = int((plain.sigma - before).abs().argmin())
        assert float(shifted.sigma[at]) == pytest.approx(after, abs=1e-6)


def test_dynamic_shifting_leaves_the_training_table_unshifted() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    torch.testing.assert_close(
        NoiseLevels.from_scheduler(scheduler).sigma, levels_of("flow").sigma, atol=0, rtol=0
    )


def test_edm_levels() -> None:
    levels = levels_of("edm")
    assert float(levels.log_snr[0]) == pytest.approx(12.4292, abs=6e-4)
    assert float(levels.log_snr[-1]) == pytest.approx(-8.7641, abs=6e-4)
    assert float(levels.sigma.min()) == pytest.approx(0.002, abs=1e-6)  # no trailing 0
    assert float(levels.timesteps[-1]) == pytest.approx(
        0.25 * torch.tensor(80.0).log().item(), abs=1e-5
    )


def test_states_of_equal_log_snr_coincide_across_families_but_for_their_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, generator=generator, dtype=torch.float64).unbind()

    def normalised(levels: NoiseLevels, at: int) -> Tensor:
        state = levels.alpha[at] * x0 + levels.sigma[at] * noise
        return state / (levels.alpha[at] ** 2 + levels.sigma[at] ** 2).sqrt()

    vp, flow, edm = levels_of("cosine"), levels_of("flow_shift_3"), levels_of("edm")
    for at in (20, 200, 500, 800):
        lam = flow.log_snr[at]
        a2 = torch.sigmoid(lam)
        expected = a2.sqrt() * x0 + (1 - a2).sqrt() * noise
        torch.testing.assert_close(normalised(flow, at), expected, atol=1e-12, rtol=0)
        for other in (vp, edm):  # the nearest level of a table is off by its spacing
            near = int((other.log_snr - lam).abs().argmin())
            spacing = float((other.log_snr[near] - lam).abs())
            gap = (normalised(other, near) - expected).abs().max()
            assert float(gap) <= 4 * spacing
    a2 = torch.sigmoid(edm.log_snr[300])
    expected = a2.sqrt() * x0 + (1 - a2).sqrt() * noise
    torch.testing.assert_close(normalised(edm, 300), expected, atol=1e-12, rtol=0)


def test_zero_terminal_levels() -> None:
    levels = levels_of("sd_zero_terminal")
    expected = torch.tensor([-12.6549, -13.2348, -14.0503, -15.4411], dtype=torch.float64)
    torch.testing.assert_close(levels.log_snr[995:999], expected, atol=6e-4, rtol=0)
    assert float(levels.log_snr[999]) == -torch.inf
    assert levels.finite.sum() == 999


@pytest.mark.parametrize("outer_edges", ["half", "clip", "inf"])
def test_a_terminal_level_at_minus_infinity_keeps_a_cell(outer_edges: str) -> None:
    levels = levels_of("sd_zero_terminal", outer_edges)
    lam = levels.log_snr
    assert float(levels.edges[-1]) == -torch.inf
    assert float(levels.edges[-2]) == pytest.approx(float(lam[998] - (lam[997] - lam[998]) / 2))
    assert bool(levels.edges[1:-1].isfinite().all())


@pytest.mark.parametrize("name", ["linear", "sd", "cosine", "edm"])
def test_edges_are_midpoints_and_outer_edges_follow_their_rule(name: str) -> None:
    lam = levels_of(name).log_snr
    ends = {
        "half": (lam[0] + (lam[0] - lam[1]) / 2, lam[-1] - (lam[-2] - lam[-1]) / 2),
        "clip": (lam[0], lam[-1]),
        "inf": (torch.tensor(torch.inf), torch.tensor(-torch.inf)),
    }
    for rule, (top, bottom) in ends.items():
        edges = levels_of(name, rule).edges
        torch.testing.assert_close(edges[1:-1], (lam[1:] + lam[:-1]) / 2, atol=1e-12, rtol=0)
        assert (float(edges[0]), float(edges[-1])) == pytest.approx((float(top), float(bottom)))
        assert bool((edges.diff() < 0).all())


def test_a_level_at_plus_infinity_keeps_a_cell_too() -> None:
    log_snr = torch.tensor([torch.inf, 2.0, 1.0, -1.0, -torch.inf], dtype=torch.float64)
    assert cell_edges(log_snr).tolist() == [torch.inf, 2.5, 1.5, 0.0, -2.0, -torch.inf]


@pytest.mark.parametrize("log_snr", [[torch.inf, 1.0, -torch.inf], [2.0, torch.nan, 1.0, 0.0]])
def test_edges_need_two_finite_neighbours(log_snr: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        cell_edges(torch.tensor(log_snr, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_set_timesteps_does_not_matter(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    before = NoiseLevels.from_scheduler(scheduler)
    scheduler.set_timesteps(7)
    after = NoiseLevels.from_scheduler(scheduler)
    for field in ("log_snr", "alpha", "sigma", "timesteps", "edges"):
        assert torch.equal(getattr(before, field), getattr(after, field)), field
    assert len(scheduler.timesteps) <= 8  # and reading the table leaves the scheduler alone


@pytest.mark.parametrize(
    "name",
    [
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_inference_schedulers_with_flow_sigmas(name: str, shift: float) -> None:
    scheduler = getattr(diffusers, name)(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )
    levels = NoiseLevels.from_scheduler(scheduler)
    training = levels_of("flow" if shift == 1.0 else "flow_shift_3")
    assert levels.family == "flow"
    assert levels.prediction_type == "flow"
    torch.testing.assert_close(levels.sigma, training.sigma, atol=2e-7, rtol=0)
    torch.testing.assert_close(levels.timesteps, training.timesteps, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_preserving_timesteps_are_integers(name: str) -> None:
    timesteps = levels_of(name).timesteps
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == list(range(1000))


def test_the_supported_schedulers_are_all_exported() -> None:
    assert {n for names in SUPPORTED.values() for n in names} <= {*EXPORTED, *NEWER}


def _shows_no_table(scheduler: Any) -> bool:
    """Whether the scheduler is refused; the error must then name the attributes it lacks."""
    try:
        NoiseLevels.from_scheduler(scheduler)
    except ValueError as error:
        parts = (type(scheduler).__name__, "`alphas_cumprod`", "`sigmas`", "`timesteps`")
        missing = [part for part in parts if part not in str(error)]
        if missing:
            pytest.fail(f"the message does not name {missing}: {error}")
        return True
    return False


@pytest.mark.parametrize("name", EXPORTED)
def test_every_scheduler_gives_a_decreasing_table_or_a_clear_error(name: str) -> None:
    kind = getattr(diffusers.schedulers, name)
    supported = {n: family for family, names in SUPPORTED.items() for n in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numpy, about diffusers' own code
            scheduler = kind()
    except ImportError:
        pytest.skip(f"{name} needs a package that is not installed")
    except TypeError:
        assert _needs_arguments(kind)
        assert name not in supported
        return
    if _shows_no_table(scheduler):
        assert name not in supported
        return
    levels = NoiseLevels.from_scheduler(scheduler)
    assert levels.family == supported.get(name, levels.family)
    assert bool((levels.log_snr.diff() < 0).all())
    assert bool((levels.edges.diff() < 0).all())
    assert bool((levels.alpha >= 0).all())
    assert bool((levels.sigma > 0).all())
    assert len(levels) >= 2


def test_what_is_no_scheduler_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"object shows no table.*alphas_cumprod.*sigmas"):
        NoiseLevels.from_scheduler(object())


def test_an_unknown_outer_edge_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outer_edges='open'.*half"):
        NoiseLevels.from_scheduler(SCHEDULERS["sd"](), "open")


def test_a_table_of_one_level_is_refused() -> None:
    with pytest.raises(ValueError, match="found 1 levels"):
        NoiseLevels.from_scheduler(diffusers.DDPMScheduler(num_train_timesteps=1))


def test_prediction_types_are_read_and_replaced() -> None:
    levels = levels_of("sd", prediction_type="v_prediction")
    assert levels.prediction_type == "v_prediction"
    sample = levels.with_prediction_type("sample")
    assert sample.prediction_type == "sample"
    assert sample.log_snr is levels.log_snr
    assert levels.with_prediction_type("flow_prediction").prediction_type == "flow"


def test_edm_schedulers_call_the_network_output_epsilon() -> None:
    """Their precondition_outputs knows "epsilon" (F) and "v_prediction" (-F)."""
    for kind, name in (("epsilon", "edm"), ("v_prediction", "v_prediction")):
        for scheduler in (diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler):
            levels = NoiseLevels.from_scheduler(scheduler(prediction_type=kind, sigma_data=0.7))  # pyright: ignore
            assert levels.prediction_type == name
            assert levels.sigma_data == 0.7
            assert levels.with_prediction_type(kind).prediction_type == name
            assert levels.with_prediction_type("edm").prediction_type == "edm"
            assert levels.to("meta").sigma_data == 0.7
    other = NoiseLevels.from_scheduler(diffusers.CMStochasticIterativeScheduler())
    assert (other.prediction_type, other.sigma_data) == ("epsilon", None)  # another c_skip
    assert levels_of("sd").with_prediction_type("epsilon").prediction_type == "epsilon"


CLOCKS = {
    "EDMEulerScheduler": (lambda sigma: sigma.log() / 4, 1e-12),
    "EDMDPMSolverMultistepScheduler": (lambda sigma: sigma.log() / 4, 1e-12),
    "ScoreSdeVeScheduler": (lambda sigma: sigma, 1e-12),
    "CMStochasticIterativeScheduler": (lambda sigma: 250 * sigma.log(), 1e-12),
    # 1 - sigma of diffusers is rounded to float32, which says where between two sigmas a level is
    "FlowMatchEulerDiscreteScheduler": (lambda sigma: 1000 * sigma, 2.0**-24),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_the_levels_between_continue_the_table(name: str) -> None:
    clock, tolerance = CLOCKS[name]
    levels = NoiseLevels.from_scheduler(getattr(diffusers, name)())
    assert levels.continuous
    for found, table in zip(
        levels.coefficients(levels.log_snr), (levels.alpha, levels.sigma), strict=True
    ):
        torch.testing.assert_close(found, table, atol=0, rtol=tolerance)
    ulp = torch.finfo(torch.float32).eps
    told = levels.conditioning(levels.log_snr)
    assert told.dtype == levels.timesteps.dtype
    torch.testing.assert_close(told, levels.timesteps, atol=0, rtol=ulp)
    between = (levels.log_snr[1:] + levels.log_snr[:-1])[:-1] / 2  # flow's last level is infinite
    alpha, sigma = levels.coefficients(between)
    torch.testing.assert_close(2 * (alpha / sigma).log(), between, atol=1e-10, rtol=1e-10)
    total = alpha + sigma if levels.family == "flow" else alpha
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-15, rtol=0)
    expected = clock(sigma)
    torch.testing.assert_close(
        levels.conditioning(between).double(), expected, atol=1e-7, rtol=2 * ulp
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_pure_noise_in_flow_matching(shift: float) -> None:
    levels = NoiseLevels.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))
    ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
    alpha, sigma = levels.coefficients(ends)
    assert (alpha.tolist(), sigma.tolist()) == ([0.0, 1.0], [1.0, 0.0])
    assert levels.conditioning(ends).tolist() == [1000.0, 0.0]


def test_coefficients_at_indices_are_those_of_the_table() -> None:
    levels, at = levels_of("sd"), torch.tensor([3, 999, 3])
    alpha, sigma = levels.coefficients(at)
    assert torch.equal(alpha, levels.alpha[at])
    assert torch.equal(sigma, levels.sigma[at])


def test_timesteps_that_do_not_follow_from_sigma_have_none_between() -> None:
    levels = levels_of("sd")
    assert not levels.continuous
    with pytest.raises(ValueError, match=r"'vp' has no levels between .*int64"):
        levels.coefficients(levels.log_snr)
    with pytest.raises(ValueError, match=r"'vp' .*continuous=False"):
        levels.conditioning(levels.log_snr)


def test_copies_for_a_device_are_made_once() -> None:
    levels = levels_of("sd")
    assert levels.to("cpu") is levels
    moved = levels.to("meta")
    assert moved.alpha.device.type == "meta"
    assert levels.to("meta") is moved


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, 4, 8, 8, generator=generator).unbind()
    indices = torch.cat(
        [torch.tensor([0, 1, 998, 999]), torch.randint(1000, (60,), generator=generator)]
    )
    return x0, noise, indices


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_noising_and_velocity_are_those_of_diffusers_bit_for_bit(name: str) -> None:
    scheduler, (x0, noise, indices) = SCHEDULERS[name](), _batch()
    objective = Objective(levels_of(name, prediction_type="v_prediction"))
    assert torch.equal(
        objective.add_noise(x0, noise, indices), scheduler.add_noise(x0, noise, indices)
    )
    assert torch.equal(
        objective.target(x0, noise, indices), scheduler.get_velocity(x0, noise, indices)
    )


@pytest.mark.parametrize("name", ["flow", "flow_shift_3"])
def test_flow_noising_is_that_of_diffusers_bit_for_bit(name: str) -> None:
    scheduler, (x0, noise, indices) = SCHEDULERS[name](), _batch()
    levels = levels_of(name)
    objective = Objective(levels)
    theirs = scheduler.scale_noise(x0, levels.timesteps[indices], noise)
    assert torch.equal(objective.add_noise(x0, noise, indices), theirs)
    assert torch.equal(objective.target(x0, noise, indices), noise - x0)


def test_edm_noising_is_that_of_diffusers() -> None:
    scheduler, (x0, noise, indices) = SCHEDULERS["edm"](), _batch()
    levels = levels_of("edm")
    theirs = scheduler.add_noise(x0, noise, levels.timesteps[indices])
    torch.testing.assert_close(
        Objective(levels).add_noise(x0, noise, indices), theirs, atol=0, rtol=1e-6
    )


def test_trained_betas_and_other_table_lengths() -> None:
    betas = torch.linspace(1e-3, 0.2, 17).tolist()
    settings: dict[str, Any] = {"num_train_timesteps": 17, "trained_betas": betas}
    levels = NoiseLevels.from_scheduler(diffusers.DDPMScheduler(**settings))
    power = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    torch.testing.assert_close(levels.alpha**2, power, atol=1e-6, rtol=0)
    assert len(NoiseLevels.from_scheduler(diffusers.DDPMScheduler(**SD | settings))) == 17


def test_a_noise_level_of_zero_has_no_timestep():
    """The logarithm that EDM tells its network, in float32."""
    with pytest.raises(ValueError, match="no decreasing table"):
        NoiseLevels.from_scheduler(diffusers.EDMEulerScheduler(sigma_min=1e-300))
