"""`auto`, the law that follows the learning, against closed forms of what it measures."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_curriculum.samplers import (
    AutoTimestepSampler,
    CurriculumTimestepSampler,
    TimestepSampler,
)
from diffusers_curriculum.samplers.auto import GrowingMeans
from tests.floors_fixtures import SCHEDULERS
from tests.samplers.test_adaptive_laws import PER_X0, x0_error

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"refresh_every": 1, "warm_up": 0, "min_observations": 1}
TARGETS = (
    ("linear", "epsilon"),
    ("linear", "v_prediction"),
    ("cosine", "sample"),
    ("flow", "flow"),
    ("flow_shift_3", "flow"),
    ("edm", "edm"),
)


def _build(schedule: str = "sd", **settings: Any) -> AutoTimestepSampler:
    return AutoTimestepSampler(SCHEDULERS[schedule](), **QUICK | settings)


def _learn(
    sampler: AutoTimestepSampler, error: np.ndarray, steps: int = 3, noise: float = 0.0
) -> AutoTimestepSampler:
    """Show every level's loss for a squared x0 error (T,), times lognormal noise of mean 1."""
    log_snr = sampler.levels.positions.numpy()
    kind, rng = sampler.levels.prediction_type, np.random.default_rng(3)
    for step in range(steps):
        factor = rng.lognormal(-(noise**2) / 2, noise, len(log_snr))
        losses = torch.tensor(PER_X0[kind](np.exp(log_snr)) * error * factor)
        sampler.observe(torch.arange(len(log_snr)), losses, step)
    return sampler


def _log_snr(sampler: TimestepSampler) -> np.ndarray:
    return sampler.levels.positions.numpy()


def _distance(law: Tensor, expected: Any) -> float:
    """Total variation."""
    other = torch.as_tensor(expected)
    return float((law / law.sum() - other / other.sum()).abs().sum() / 2)


def _half_known(sampler: TimestepSampler, variance: float, sharpness: float) -> Tensor:
    """The law in closed form for normal data: (s S / (1 + s S)^2)^k, as densities over log-SNR."""
    log_snr = sampler.levels.positions + np.log(variance)
    half_known = torch.sigmoid(log_snr) * torch.sigmoid(-log_snr)
    widths = -sampler.levels.edges.diff()
    return half_known.pow(sharpness) * torch.where(widths.isfinite(), widths, 0.0)


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
@pytest.mark.parametrize(("schedule", "kind"), TARGETS)
def test_the_law_of_normal_data_of_unit_scale(schedule: str, kind: str, sharpness: float) -> None:
    settings = {"sharpness": sharpness, "bandwidth": 0.01, "bins": 200, "prediction_type": kind}
    sampler = _build(schedule, **settings)
    law = _learn(sampler, x0_error(_log_snr(sampler), 1.0)).law(0, CPU)
    assert _distance(law, _half_known(sampler, 1.0, sharpness)) < 0.02


@pytest.mark.parametrize("variance", [0.02, 0.25, 30.0])
@pytest.mark.parametrize(("schedule", "kind"), TARGETS[1:])
def test_it_finds_the_scale_of_the_data(schedule: str, kind: str, variance: float) -> None:
    sampler = _build(schedule, bandwidth=0.01, bins=200, prediction_type=kind)
    law = _learn(sampler, x0_error(_log_snr(sampler), variance)).law(0, CPU)
    # the noisiest level knows nothing: that of SD's schedule does, of large data
    assert _distance(law, _half_known(sampler, variance, 3.0)) < 0.05


def test_the_centre_moves_as_the_network_learns() -> None:
    """Errors that fall at coarse levels first: later draws go to finer ones."""
    sampler = _build("flow", max_x0_error=1.0)
    log_snr = _log_snr(sampler)
    medians = []
    for edge in (1.0, 3.0):  # where the error has fallen to a half
        fresh = _learn(_build("flow"), 0.1 / (1 + np.exp(log_snr - edge)))
        medians.append(float(fresh.metrics()["law_median_log_snr"]))
    assert medians[0] == pytest.approx(1.0, abs=0.3)
    assert medians[1] == pytest.approx(3.0, abs=0.3)


def test_scattered_losses_hardly_move_it() -> None:
    sampler = _build("linear", prediction_type="v_prediction")
    error = x0_error(_log_snr(sampler), 0.3)
    calm = _learn(sampler, error).law(0, CPU)
    scattered = _build("linear", prediction_type="v_prediction")
    assert _distance(_learn(scattered, error, steps=30, noise=0.5).law(0, CPU), calm) < 0.1


def test_a_dip_among_noisy_levels_is_not_believed() -> None:
    """The error of x0 can only grow towards noise: where it does not, chance has it."""
    sampler = _build("linear", prediction_type="v_prediction", bandwidth=0.1)
    log_snr = _log_snr(sampler)
    error = x0_error(log_snr, 1.0)
    dipped = np.where((log_snr < -7) & (log_snr > -8), error / 2, error)
    law = _learn(sampler, dipped).law(0, CPU)
    assert float(law[torch.tensor((log_snr < -6.8) & (log_snr > -8.2))].sum()) < 1e-3


def test_an_epsilon_error_says_little_of_x0_in_almost_pure_noise() -> None:
    sampler = _build("linear", prediction_type="epsilon")
    log_snr = _log_snr(sampler)
    magnified = x0_error(log_snr, 1.0) * (1 + 0.02 * np.exp(-log_snr))
    law = _learn(sampler, magnified).law(0, CPU)
    assert float(law[torch.tensor(magnified > 3)].sum()) < 1e-3
    assert _distance(law, _half_known(sampler, 1.0, 3.0)) < 0.1


@pytest.mark.parametrize("power", [0.25, 0.8])
@pytest.mark.parametrize("bottom", [0.0, 2.0])
def test_the_memory_grows_with_the_run(power: float, bottom: float) -> None:
    """Of values bottom + n^-a the mean with weights (n / N)^4 is bottom + N^-a 5 / (5 - a)."""
    sampler, steps = _build(), 1000
    statistics, _ = sampler._present()
    assert isinstance(statistics, GrowingMeans)
    state, cell = statistics.initial_state(), torch.arange(len(sampler.levels))
    for step in range(steps):
        values = torch.full((len(cell),), bottom + (step + 1.0) ** -power, dtype=torch.float64)
        statistics.add(state, cell, values, values > 0)
        statistics.fold(state)
    expected = bottom + steps**-power * 5 / (5 - power)
    torch.testing.assert_close(
        statistics.profile(state), torch.full_like(values, expected), rtol=2e-3, atol=0
    )


def test_a_run_goes_on_bit_for_bit() -> None:
    rng = np.random.default_rng(5)
    seen = [
        (torch.tensor(rng.integers(0, 1000, 16)), torch.tensor(rng.lognormal(size=16)))
        for _ in range(60)
    ]
    whole, first = _build(refresh_every=7, bins=8), _build(refresh_every=7, bins=8)
    for step, (indices, losses) in enumerate(seen):
        whole.observe(indices, losses, step)
        if step < 31:
            first.observe(indices, losses, step)
    second = _build(refresh_every=7, bins=8)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step, (indices, losses) in enumerate(seen[31:], 31):
        second.observe(indices, losses, step)
    assert torch.equal(whole.probabilities(60), second.probabilities(60))
    ours, theirs = whole.state_dict(), second.state_dict()
    assert all(torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(theirs[k])) for k in ours)


def test_under_a_curriculum_it_learns_from_the_open_levels() -> None:
    base = _build("flow", bandwidth=0.01, bins=200)
    sampler = CurriculumTimestepSampler(
        base, clusters=2, pacing="fixed", pacing_args={"stage_steps": 10}
    )
    opened = sampler.open_levels(1)
    levels = opened.nonzero().flatten()
    log_snr = _log_snr(base)
    for step in range(5):
        losses = PER_X0["flow"](np.exp(log_snr)) * x0_error(log_snr, 1.0)
        sampler.observe(levels, torch.tensor(losses)[levels], step)
    law = base.law(0, CPU)
    assert _distance(law[levels], _half_known(base, 1.0, 3.0)[levels]) < 0.02
    shut = slice(0, int(levels[0]) - 5)  # but for the bin that the cluster cuts
    torch.testing.assert_close(law[shut], _build("flow").law(0, CPU)[shut])


@pytest.mark.parametrize("loss", [0.0, float("nan"), float("inf")])
def test_losses_that_tell_nothing_leave_the_warm_up_law(loss: float) -> None:
    sampler, fresh = _build(), _build()
    _learn(sampler, np.full(1000, loss))
    torch.testing.assert_close(sampler.law(0, CPU), fresh.law(0, CPU))


def test_the_warm_up_is_a_laplace_between_structure_and_noise() -> None:
    config = AutoTimestepSampler(SCHEDULERS["flow"]()).config
    assert config["warm_up_density"] == "laplace"
    assert config["warm_up_density_args"] == {"mu": -0.5, "b": 1.0}
    other = AutoTimestepSampler(SCHEDULERS["flow"](), warm_up_density="uniform")
    assert other.config["warm_up_density_args"] == {}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sharpness": 0.0}, "sharpness=0.0"),
        ({"bandwidth": 0.0}, "bandwidth=0.0"),
        ({"max_x0_error": 0.0}, "max_x0_error=0.0"),
        ({"floor": 0.0}, "floor=0.0"),
    ],
)
def test_wrong_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _build(**setting)
