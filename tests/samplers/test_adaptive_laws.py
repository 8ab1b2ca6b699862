"""The law that each adaptive sampler converges to, against plain numpy and the papers' examples."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import (
    GradientNormTimestepSampler,
    InformationRateTimestepSampler,
    LossProportionalTimestepSampler,
    LossSecondMomentTimestepSampler,
)
from diffusers_curriculum.weighting import loss_weights
from tests.floors_fixtures import SCHEDULERS
from tests.samplers.adaptive_fixtures import loss_profile, random_losses, teach

CPU = torch.device("cpu")
EXACT: dict[str, Any] = {"neighbours": 0, "min_observations": 1, "warm_up": 0, "refresh_every": 2}


def _with_floor(law: np.ndarray, floor: float) -> np.ndarray:
    return (1 - floor) * law / law.sum() + floor / len(law)


def _assert_mass(sampler: Any, law: np.ndarray, rel: float = 1e-10) -> None:
    expected = _with_floor(law, sampler.floor)
    np.testing.assert_allclose(sampler.probabilities().numpy(), expected, rtol=rel)


def _weights(name: str, levels: NoiseLevels) -> np.ndarray:
    weights = loss_weights(name, levels)
    return np.ones(len(levels)) if weights is None else weights.double().numpy()


# -- loss second moment ----------------------------------------------------------------------------


def test_second_moment_of_five_constant_losses() -> None:
    sampler = LossSecondMomentTimestepSampler(SCHEDULERS["linear"](num_train_timesteps=5), bins=5)
    assert sampler.floor == 1e-3
    for step in range(10):
        assert float(sampler.probabilities()[0]) == 0.2
        sampler.observe(torch.arange(5), torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]), step)
    mass, importance = sampler.probabilities(), sampler.importance()
    expected = torch.tensor([0.1001, 0.2, 0.2999, 0.3998, 0.0002], dtype=torch.float64)
    torch.testing.assert_close(mass, expected, atol=1e-15, rtol=1e-12)
    rounded = torch.tensor([1.998, 1.0, 0.66689, 0.50025, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(importance, rounded, atol=0, rtol=3e-6)
    # every draw then adds the same to the loss, where the floor does not count
    cost = (importance * torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]))[:4]
    assert float(cost.max() - cost.min()) < 5e-3


@pytest.mark.parametrize("batch", [4, 33])
def test_with_a_bin_for_each_level_it_is_the_published_rule(batch: int) -> None:
    levels, history = 20, [deque(maxlen=10) for _ in range(20)]
    scheduler = SCHEDULERS["linear"](num_train_timesteps=levels)
    sampler = LossSecondMomentTimestepSampler(scheduler, bins=levels, seed=3)
    learned = 0
    for step in range(160):
        indices = sampler.sample(batch, step=step).indices
        losses = random_losses(step, batch) * (1 + indices)
        sampler.observe(indices, losses, step)
        for index, loss in zip(indices.tolist(), losses.tolist(), strict=True):
            history[index].append(loss)
        if all(len(h) == 10 for h in history):
            root = np.array([math.sqrt(np.mean(np.square(h))) for h in history])
            expected = root / root.sum() * (1 - 1e-3) + 1e-3 / levels
            learned += 1
        else:
            expected = np.full(levels, 1 / levels)
        np.testing.assert_allclose(sampler.probabilities().numpy(), expected, rtol=1e-12)
    assert learned > 20
    np.testing.assert_allclose(sampler.importance(), 1 / levels / expected, rtol=1e-10)


def test_defaults_of_the_published_rule_are_the_papers() -> None:
    published = LossSecondMomentTimestepSampler(SCHEDULERS["sd"](), bins=1000).config
    assert [published[k] for k in ("floor", "refresh_every", "min_observations", "warm_up")] == [
        1e-3,
        1,
        10,
        0,
    ]
    binned = LossSecondMomentTimestepSampler(SCHEDULERS["sd"]()).config
    assert [binned[k] for k in ("bins", "floor", "refresh_every")] == [64, 0.1, 100]
    given = LossSecondMomentTimestepSampler(SCHEDULERS["sd"](), bins=1000, floor=0.2).config
    assert given["floor"] == 0.2


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_binned_second_moments_follow_the_roots_of_their_means(weighting: str) -> None:
    sampler = LossSecondMomentTimestepSampler(
        SCHEDULERS["sd"](), bins=50, loss_weighting=weighting, **EXACT
    )
    profile = loss_profile(1000)
    # two losses at each level, 0.5 and 1.5 times the profile: their mean square is 1.25 times its
    indices = torch.arange(1000).repeat(2)
    losses = profile[indices] * torch.tensor([0.5, 1.5], dtype=torch.float64).repeat_interleave(
        1000
    )
    for step in range(4):
        sampler.observe(indices, losses, step)
    lam = sampler.levels.log_snr.numpy()
    # averaged weighted, so that bins over which the weight changes say what they are to say
    squares = 1.25 * (_weights(weighting, sampler.levels) * profile.numpy()) ** 2
    groups = np.arange(1000) * 50 // 1000
    means = [squares[groups == g].mean() for g in range(50)]
    centres = [lam[groups == g].mean() for g in range(50)]
    at_levels = np.interp(-lam, -np.array(centres), means)
    _assert_mass(sampler, np.sqrt(at_levels))


# -- loss proportional -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["sd", "cosine", "flow_shift_3", "edm", "sd_zero_terminal"])
@pytest.mark.parametrize("weighting", ["none", "soft_min_snr"])
@pytest.mark.parametrize("measure", ["log_snr", "draw"])
def test_proportional_laws(schedule: str, weighting: str, measure: str) -> None:
    levels = len(NoiseLevels.from_scheduler(SCHEDULERS[schedule]()))
    sampler = LossProportionalTimestepSampler(
        SCHEDULERS[schedule](), measure=measure, bins=levels, loss_weighting=weighting, **EXACT
    )
    profile = loss_profile(levels)
    teach(sampler, profile)
    edges = sampler.levels.edges.numpy()
    width = edges[:-1] - edges[1:]
    if np.isinf(width[-1]):
        width[-1] = width[-2]
    measured = width if measure == "log_snr" else np.ones(levels)
    _assert_mass(sampler, measured * _weights(weighting, sampler.levels) * profile.numpy())


@pytest.mark.parametrize("schedule", ["linear", "sd", "cosine"])
@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_the_corrected_loss_is_the_same_at_every_draw_but_for_the_floor(
    schedule: str, weighting: str
) -> None:
    """With all defaults, and exact losses of Gaussian data."""
    sampler = LossProportionalTimestepSampler(
        SCHEDULERS[schedule](), loss_weighting=weighting, **EXACT
    )
    snr = sampler.levels.log_snr.exp()
    losses = snr * torch.tensor(x0_error(sampler.levels.log_snr.numpy()))
    teach(sampler, losses)
    weighted = torch.tensor(_weights(weighting, sampler.levels)) * losses
    mass, corrected = sampler.probabilities(), sampler.importance() * weighted
    mean = (mass * corrected).sum()
    assert float((mass * (corrected - mean).square()).sum().sqrt() / mean) < 0.25


def test_every_draw_has_the_same_corrected_loss_on_average() -> None:
    sampler = LossProportionalTimestepSampler(
        SCHEDULERS["sd"](), bins=1000, floor=1e-9, loss_weighting="min_snr", **EXACT
    )
    profile = loss_profile(1000)
    teach(sampler, profile)
    loss = sampler.importance().numpy() * _weights("min_snr", sampler.levels) * profile.numpy()
    np.testing.assert_allclose(loss, loss[0], rtol=1e-5)


def test_per_unit_of_log_snr_is_per_draw_of_weights_in_that_measure() -> None:
    # a weight per unit of log-SNR is one per draw once it is multiplied by the cell's width
    settings = {"bins": 1000, **EXACT}
    first = LossProportionalTimestepSampler(
        SCHEDULERS["sd"](), measure="log_snr", loss_weighting="min_snr", **settings
    )
    second = LossProportionalTimestepSampler(
        SCHEDULERS["sd"](),
        measure="draw",
        loss_weighting="min_snr",
        loss_weighting_args={"measure": "log_snr"},
        **settings,
    )
    for sampler in (first, second):
        teach(sampler, loss_profile(1000))
    torch.testing.assert_close(first.probabilities(), second.probabilities(), rtol=1e-5, atol=0)


# -- information rate ------------------------------------------------------------------------------

# loss of each target for one error of x0: x0 error times this, S = SNR
PER_X0 = {
    "epsilon": lambda snr: snr,
    "sample": lambda snr: np.ones_like(snr),
    "v_prediction": lambda snr: 1 + snr,
    "flow": lambda snr: (1 + np.sqrt(snr)) ** 2,
    "edm": lambda snr: snr + 4,  # sigma_data = 0.5
}
CASES = [
    ("sd", "epsilon"),
    ("sd", "v_prediction"),
    ("linear", "sample"),
    ("cosine", "epsilon"),
    ("flow_shift_3", "flow"),
    ("flow", "flow"),
    ("edm", "edm"),
]


def x0_error(log_snr: np.ndarray, variance: float = 0.25) -> np.ndarray:
    """Mean squared error of the best guess of Gaussian data."""
    return variance / (1 + np.exp(log_snr) * variance)


def _informed(
    schedule: str, kind: str, variance: float = 0.25, **kwargs: Any
) -> InformationRateTimestepSampler:
    scheduler = SCHEDULERS[schedule]()
    levels = len(NoiseLevels.from_scheduler(scheduler))
    sampler = InformationRateTimestepSampler(
        scheduler, prediction_type=kind, bins=levels, **EXACT | kwargs
    )
    lam = sampler.levels.log_snr.numpy()
    losses = PER_X0[kind](np.exp(lam)) * x0_error(lam, variance)
    teach(sampler, torch.tensor(losses))
    return sampler


def information_law(sampler: Any, weight_x0: np.ndarray, variance: float = 0.25) -> np.ndarray:
    """g S m / W_x0 dl, with c by the onset rule."""
    lam, edges = sampler.levels.log_snr.numpy(), sampler.levels.edges.numpy()
    sigma, error = np.exp(-lam / 2), x0_error(lam, variance)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(np.isfinite(lam), error / sigma**3, 0.0)
        c = max(s for s, r in zip(sigma, rate, strict=True) if r >= 0.002 * max(rate))
        gate = np.where(np.isfinite(sigma), sigma**3 / (sigma**3 + c**3), 1.0)
        return gate * np.exp(lam) * error / weight_x0 * (edges[:-1] - edges[1:])


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_information_laws_of_each_target(schedule: str, kind: str) -> None:
    sampler = _informed(schedule, kind)
    expected = information_law(sampler, PER_X0[kind](np.exp(sampler.levels.log_snr.numpy())))
    finite = sampler.levels.finite.numpy()
    assert finite.sum() >= 999
    # the share of a level at infinity is this library's choice: compare the others among themselves
    law = sampler.law(0, CPU).numpy()[finite]
    np.testing.assert_allclose(
        law / law.sum(), expected[finite] / expected[finite].sum(), rtol=1e-7
    )


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased"])
@pytest.mark.parametrize(("schedule", "kind"), [("sd", "v_prediction"), ("flow", "flow")])
def test_a_weighting_changes_the_law_and_not_the_objective(
    schedule: str, kind: str, weighting: str
) -> None:
    plain, weighted = _informed(schedule, kind), _informed(schedule, kind, loss_weighting=weighting)
    assert bool(weighted.probabilities().isfinite().all())
    finite = plain.levels.finite
    weights = loss_weights(weighting, weighted.levels)
    assert weights is not None
    # law x weight on the target, the objective, is proportional whatever the weight
    law = [s.law(0, CPU)[finite] for s in (plain, weighted)]
    objective = [law[0], law[1] * weights[finite]]
    ratio = objective[1] / objective[0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0])), rtol=1e-5, atol=0)
    assert not torch.allclose(law[0], law[1], rtol=0.1)


@pytest.mark.parametrize("gate", [0.15, 2.0])
def test_a_fixed_gate_is_where_it_is_asked_for(gate: float) -> None:
    sampler, open_one = _informed("sd", "epsilon", gate=gate), _informed("sd", "epsilon", gate=0)
    sigma = np.exp(-sampler.levels.log_snr.numpy() / 2)
    ratio = (sampler.law(0, CPU) / open_one.law(0, CPU)).numpy()
    expected = sigma**3 / (sigma**3 + gate**3)
    np.testing.assert_allclose(ratio / ratio[-1], expected / expected[-1], rtol=1e-9)
    assert float(sampler.metrics()["gate"]) == pytest.approx(gate)
    assert float(open_one.metrics()["gate"]) == 0.0


def test_errors_above_what_data_allow_do_not_draw_all_mass_to_the_noise() -> None:
    def law(**kwargs: Any) -> Tensor:
        sampler = InformationRateTimestepSampler(
            SCHEDULERS["linear"](), bins=1000, **EXACT | kwargs
        )
        lam = sampler.levels.log_snr
        # an epsilon network whose own error of 0.002 outlasts what there is to know
        teach(sampler, lam.exp() * torch.tensor(x0_error(lam.numpy())) + 0.002)
        return sampler.law(0, CPU)

    lam = NoiseLevels.from_scheduler(SCHEDULERS["linear"]()).log_snr
    noisy = lam < -7
    assert float(law(max_x0_error=None)[noisy].sum()) > 0.9
    bounded = law()
    assert float(bounded[noisy].sum()) < 0.6
    # where the bound holds, equal shares per unit of log-SNR
    edges = NoiseLevels.from_scheduler(SCHEDULERS["linear"]()).edges
    density = (bounded / -edges.diff())[noisy]
    torch.testing.assert_close(
        density, torch.full_like(density, float(density[0])), rtol=1e-3, atol=0
    )


def test_a_gate_at_the_clean_end_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> int:
        found = sum("lowest quarter" in r.message for r in caplog.records)
        caplog.clear()
        return found

    with caplog.at_level(logging.WARNING):
        InformationRateTimestepSampler(SCHEDULERS["edm"](), gate=0.15)
        assert warnings() == 0
        InformationRateTimestepSampler(SCHEDULERS["edm"](), gate=0.01)
        assert warnings() == 1
        InformationRateTimestepSampler(SCHEDULERS["edm"](), gate=0)
        assert warnings() == 1
        # the onset rule is told at the next checkpoint: a step reads nothing back
        good, bad = (_informed("sd", "epsilon", onset=o) for o in (0.002, 0.9))
        assert warnings() == 0
        good.state_dict()
        assert warnings() == 0
        bad.state_dict()
        assert warnings() == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gate": -0.1}, r"gate=-0.1 must be 0 or more"),
        ({"gate_power": 0}, r"gate_power=0 must be greater than 0"),
        ({"onset": math.nan}, r"onset=nan"),
        ({"max_x0_error": 0.0}, r"max_x0_error=0.0"),
        ({"scheduler": "sd_zero_terminal", "max_x0_error": None}, r"max_x0_error=None needs"),
        (
            {
                "scheduler": "sd",
                "prediction_type": "v_prediction",
                "loss_weighting": "min_snr",
                "loss_weighting_args": {"gamma": 1e-300},
            },
            r"loss weighting 'min_snr' is 0 at index \d+ .* positive on the whole schedule",
        ),
    ],
)
def test_wrong_settings_of_the_information_rate(kwargs: dict[str, Any], message: str) -> None:
    scheduler = SCHEDULERS[kwargs.pop("scheduler", "sd")]()
    with pytest.raises(ValueError, match=message):
        InformationRateTimestepSampler(scheduler, **kwargs)


# -- gradient norms --------------------------------------------------------------------------------


def _gradient_sampler(levels: int = 4, **kwargs: Any) -> GradientNormTimestepSampler:
    scheduler = SCHEDULERS["linear"](num_train_timesteps=levels)
    return GradientNormTimestepSampler(scheduler, bins=levels, **EXACT | kwargs)


def test_the_law_of_least_variance() -> None:
    sampler = _gradient_sampler(floor=1e-13)
    squares = torch.tensor([16.0, 4.0, 1.0, 0.25])
    for step in range(2):
        sampler.observe_gradients(torch.arange(4), squares, step)
        sampler.observe(torch.arange(4), torch.ones(4), step)
    mass, importance = sampler.probabilities().numpy(), sampler.importance().numpy()
    np.testing.assert_allclose(mass, np.array([8, 4, 2, 1]) / 15, rtol=1e-12)
    second_moment = (mass * importance**2 * squares.numpy()).sum()
    assert second_moment == pytest.approx(3.515625, rel=1e-9)
    assert (squares / 4).sum() == 5.3125
    # no other law does better
    rng = np.random.default_rng(0)
    for other in rng.dirichlet(np.ones(4), 1000):
        assert (squares.numpy() / 16 / other).sum() >= 3.515625


@pytest.mark.parametrize("mode", ["gradients", "loss"])
@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_gradient_laws_on_a_schedule(mode: str, weighting: str) -> None:
    sampler = _gradient_sampler(200, mode=mode, loss_weighting=weighting)
    profile, noise = loss_profile(200), loss_profile(200, seed=5)
    for step in range(2):
        if mode == "gradients":
            sampler.observe_gradients(torch.arange(200), profile, step)
        # in mode "gradients" the losses must not count
        sampler.observe(torch.arange(200), profile if mode == "loss" else noise, step)
    _assert_mass(sampler, _weights(weighting, sampler.levels) * profile.sqrt().numpy())
