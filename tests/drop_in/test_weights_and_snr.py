"""The loss weighting and the SNR, against diffusers and against corruption itself."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import diffusers
import pytest
import torch
from diffusers import training_utils
from torch import Tensor

from diffusers_curriculum import NoiseLevels, drop_in, loss_weights
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.weighting import WEIGHTINGS
from tests.floors_fixtures import SCHEDULERS, levels_of

INNER = torch.linspace(0.001, 1, 1000)
# defined for other targets than the velocity, or for a whole variance preserving schedule
NOT_ON_FLOW = {"debiased_kohya", "debiased_onetrainer", "p2_onetrainer", "speed"}
CLOSED_FORMS: dict[str, Any] = {  # on flow velocity, t = sigma, S = ((1 - t) / t)^2
    "min_snr": lambda t, snr: t**2 * snr.clamp_max(5.0),
    "soft_min_snr": lambda t, snr: t**2 * 4 * snr / (snr + 4),
    "p2": lambda t, snr: (1 - t) ** 2 / (1 + snr),
    "debiased": lambda t, snr: t * (1 - t),
    "sigmoid": lambda t, snr: t**2 * snr / (1 + snr),
}


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap", "none", "logit_normal", "mode"])
def test_diffusers_names_are_bit_equal(name: str, dtype: torch.dtype) -> None:
    sigmas = INNER.to(dtype).view(-1, 1, 1, 1)
    ours = drop_in.compute_loss_weighting_for_sd3(name, sigmas)
    theirs = training_utils.compute_loss_weighting_for_sd3(name, sigmas)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def test_the_sd3_weights_are_those_of_the_paper() -> None:
    t = INNER.double()
    torch.testing.assert_close(
        drop_in.compute_loss_weighting_for_sd3("sigma_sqrt", t).double(), t**-2
    )
    torch.testing.assert_close(
        drop_in.compute_loss_weighting_for_sd3("cosmap", t), 2 / (torch.pi * (1 - 2 * t + 2 * t**2))
    )


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_weightings_are_taken_on_the_velocity(name: str) -> None:
    t = INNER.double()[:-1]
    weights = drop_in.compute_loss_weighting_for_sd3(name, t.float().view(-1, 1, 1))
    assert weights.shape == (999, 1, 1)
    assert weights.dtype == torch.float32
    exact = CLOSED_FORMS[name](t, ((1 - t) / t) ** 2)
    torch.testing.assert_close(weights.flatten().double(), exact, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", sorted(set(WEIGHTINGS) - NOT_ON_FLOW))
def test_every_weighting_is_that_of_the_schedule(name: str, shift: float) -> None:
    levels = NoiseLevels.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))
    expected = loss_weights(name, levels, "flow")
    assert expected is not None
    ours = drop_in.compute_loss_weighting_for_sd3(f"weighting:{name}", levels.sigma)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted(NOT_ON_FLOW))
def test_a_weighting_of_another_target_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is defined for|needs a whole schedule"):
        drop_in.compute_loss_weighting_for_sd3(f"weighting:{name}", INNER)


def test_a_script_that_compares_x0_needs_the_weight_on_x0() -> None:
    t = INNER.double()[:-1]
    velocity = drop_in.compute_loss_weighting_for_sd3("min_snr", t)
    x0 = drop_in.compute_loss_weighting_for_sd3("min_snr", t, prediction_type="sample")
    torch.testing.assert_close(velocity.double(), t**2 * x0, rtol=1e-4, atol=1e-9)


def test_the_ends_have_their_limits() -> None:
    ends = torch.tensor([0.0, 1.0])
    weigh = drop_in.compute_loss_weighting_for_sd3
    assert weigh("min_snr", ends).tolist() == [0.0, 0.0]
    assert weigh("min_snr", ends, prediction_type="sample").tolist() == [5.0, 0.0]
    assert weigh("sigmoid", ends, prediction_type="sample", bias=1.0)[0] == pytest.approx(2.71828)


@pytest.mark.parametrize("name", sorted(set(DENSITIES) - set(WEIGHTINGS)))
def test_a_density_weighs_nothing(name: str) -> None:
    sigmas = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(0))
    for known in {name, f"density:{name}"}:
        ours = drop_in.compute_loss_weighting_for_sd3(known, sigmas)
        assert torch.equal(ours, torch.ones(3, 1, 1))


@pytest.mark.parametrize(
    ("name", "sigmas", "options", "message"),
    [
        ("sigma_sqrt", torch.zeros(1), {}, "infinite at sigma = 0.0"),
        ("debiased", torch.zeros(1), {"prediction_type": "sample"}, "infinite"),
        ("min_snr", None, {}, "sigmas=None"),
        ("min_snr", torch.tensor([500.0]), {}, "from 0 to 1"),
        ("cosmap", torch.tensor([float("nan")]), {}, "from 0 to 1"),
        ("min_snr", torch.ones(1), {"gama": 1.0}, "no parameter 'gama'"),
        ("cosmap", torch.ones(1), {"gamma": 1.0}, "takes no parameter 'gamma'"),
        ("laplace", torch.ones(1), {"mu": 1.0}, "takes no parameter 'mu'"),
        ("min_snr", torch.ones(1), {"prediction_type": "velocity"}, "'velocity'"),
    ],
)
def test_what_has_no_weight_is_refused(name: str, sigmas: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drop_in.compute_loss_weighting_for_sd3(name, sigmas, **options)


# -- SNR -------------------------------------------------------------------------------------------


def supported() -> dict[str, Any]:
    """Every scheduler of diffusers, with its defaults, that has a table of noise levels."""
    found: dict[str, Any] = {}
    for name in sorted(set(dir(diffusers.schedulers))):
        kind = getattr(diffusers.schedulers, name)
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)):
            continue
        with warnings.catch_warnings():  # of their own numpy calls
            warnings.simplefilter("ignore")
            try:
                scheduler: Any = kind()  # type: ignore[call-arg]
                NoiseLevels.from_scheduler(scheduler)
            except (ValueError, ImportError, TypeError):
                continue
        found[name] = scheduler
    return found


SUPPORTED = supported() | {name: make() for name, make in SCHEDULERS.items()}


# these take something else than timesteps, or nothing
MIX_OTHERWISE = {"HeliosDMDScheduler", "RePaintScheduler", "ScoreSdeVeScheduler"}
MIXING = [
    name
    for name, scheduler in SUPPORTED.items()
    if name not in MIX_OTHERWISE
    and (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise"))
]


def measured_snr(scheduler: Any, timestep: Tensor) -> Tensor:
    """Squared ratio of what ``add_noise`` leaves of the data and puts in of the noise."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    if hasattr(scheduler, "scale_noise"):  # FlowMatchHeun's remembers its first timestep
        signal = mixing(scheduler).scale_noise(one, timestep, zero)
        noise = mixing(scheduler).scale_noise(zero, timestep, one)
    else:
        signal = mixing(scheduler).add_noise(one, zero, timestep)
        noise = mixing(scheduler).add_noise(zero, one, timestep)
    return (signal / noise).square().flatten()


def mixing(scheduler: Any) -> Any:
    """A copy whose ``add_noise`` is ready: solvers read it upside down before set_timesteps."""
    ready = copy.deepcopy(scheduler)
    if "solver_order" in ready.config and "Inverse" not in type(ready).__name__:
        ready.set_timesteps(1000)
    return ready


def test_the_families_are_all_there() -> None:
    families = {NoiseLevels.from_scheduler(s).family for s in SUPPORTED.values()}
    assert families == {"vp", "flow", "edm"}
    assert len(SUPPORTED) > 25


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_table_comes_back(name: str) -> None:
    levels = NoiseLevels.from_scheduler(SUPPORTED[name])
    snr = drop_in.compute_snr(SUPPORTED[name], levels.timesteps)
    assert snr.dtype == torch.float32
    finite = levels.finite & (levels.log_snr < 80)
    torch.testing.assert_close(
        snr[finite].log().double(), levels.log_snr[finite], rtol=1e-4, atol=1e-3
    )
    assert bool((snr[levels.log_snr == -torch.inf] == 0).all())


@pytest.mark.parametrize("name", MIXING)
def test_it_is_the_ratio_that_the_scheduler_really_mixes(name: str) -> None:
    scheduler = SUPPORTED[name]
    levels = NoiseLevels.from_scheduler(scheduler)
    at = torch.tensor([100, 300, 500, 700, 900]) * len(levels) // 1000
    timesteps = levels.timesteps[at]
    expected = torch.cat([measured_snr(scheduler, t[None]) for t in timesteps])
    torch.testing.assert_close(
        drop_in.compute_snr(scheduler, timesteps), expected, rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("name", [n for n, s in SUPPORTED.items() if hasattr(s, "alphas_cumprod")])
def test_variance_preserving_values_are_bit_equal_to_diffusers(name: str) -> None:
    scheduler = SUPPORTED[name]
    timesteps = torch.arange(len(scheduler.alphas_cumprod))
    theirs = training_utils.compute_snr(scheduler, timesteps)
    assert torch.equal(drop_in.compute_snr(scheduler, timesteps), theirs)


def test_any_shape_and_integral_floats_are_understood() -> None:
    scheduler = SCHEDULERS["sd"]()
    flat = drop_in.compute_snr(scheduler, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(drop_in.compute_snr(scheduler, torch.arange(4).view(2, 2)).flatten(), flat)
    assert torch.equal(drop_in.compute_snr(scheduler, torch.arange(4.0)), flat)


def test_a_used_scheduler_is_read_as_new() -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = scheduler.timesteps[[10, 20]].clone()
    expected = drop_in.compute_snr(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), timesteps)
    scheduler.set_timesteps(5)
    assert torch.equal(drop_in.compute_snr(scheduler, timesteps), expected)


@pytest.mark.parametrize(
    ("name", "timestep"),
    [
        ("sd", 1000.0),
        ("sd", -1.0),
        ("sd", 0.5),
        ("flow", 0.5),
        ("flow_shift_3", 501.0),
        ("flow_shift_3", 0.9),
        ("edm", 3.0),
        ("flow", float("nan")),
    ],
)
def test_a_timestep_of_another_schedule_is_refused(name: str, timestep: float) -> None:
    levels = levels_of(name)
    with pytest.raises(ValueError, match="is not one of the scheduler's 100"):
        drop_in.compute_snr(
            SCHEDULERS[name](), torch.tensor([float(levels.timesteps[3]), timestep])
        )
