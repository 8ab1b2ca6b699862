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
from diffusers_curriculum.samplers.auto import ProgressMeans
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
    rng = np.random.default_rng(3)
    for step in range(steps):
        _show(sampler, error * rng.lognormal(-(noise**2) / 2, noise, len(error)), step)
    return sampler


def _show(sampler: AutoTimestepSampler, error: np.ndarray, step: int) -> None:
    """One step at every level, with a squared x0 error (T,)."""
    per_x0 = PER_X0[sampler.levels.prediction_type](np.exp(_log_snr(sampler)))
    sampler.observe(torch.arange(len(error)), torch.tensor(per_x0 * error), step)


def _log_snr(sampler: TimestepSampler) -> np.ndarray:
    return sampler.levels.positions.numpy()


def _distance(law: Tensor, expected: Any) -> float:
    """Total variation."""
    other = torch.as_tensor(expected)
    return float((law / law.sum() - other / other.sum()).abs().sum() / 2)


def _half_known(sampler: TimestepSampler, variance: float, sharpness: float) -> Tensor:
    """The law in closed form for normal data and equal progress: (s S / (1 + s S)^2)^a per unit of
    log-SNR."""
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
    assert _distance(law, _half_known(sampler, variance, sampler.sharpness)) < 0.05


def test_draws_go_where_there_is_progress() -> None:
    for edge in (-2.0, 0.0, 2.0):
        sampler = _build(bandwidth=0.1)
        log_snr = _log_snr(sampler)
        for step in range(200):
            left = np.where(log_snr < edge, (step + 1.0) ** -0.5, 1.0)
            _show(sampler, x0_error(log_snr, 1.0) * left, step)
        below = sampler.levels.positions < edge
        assert float(sampler.law(0, CPU)[below].sum()) > 0.9


def test_twice_the_progress_is_drawn_twice_as_often() -> None:
    settings = {"prediction_type": "v_prediction", "bandwidth": 0.01, "bins": 200}
    sampler = _build("linear", **settings)
    log_snr = _log_snr(sampler)
    for step in range(200):  # of n^-a the progress is nearly 0.27 a; all end at the same share
        left = ((step + 1.0) / 200) ** -np.where(log_snr < 0, 0.6, 0.3)
        _show(sampler, x0_error(log_snr, 1.0) * left, step)
    statistics, state = sampler._present()[0], sampler._state
    assert isinstance(statistics, ProgressMeans)
    progress = statistics.spread @ statistics.progress(state)[0]
    profile = statistics.profile(state) / (1 + sampler.levels.positions.exp())
    error = profile.cummax(0).values
    widths = -sampler.levels.edges.diff()
    expected = (error * (1 - error / error[-1])).pow(2) * progress * widths
    coarse, fine = (progress[torch.tensor(mask)].mean() for mask in (log_snr < -1, log_snr > 1))
    assert 1.8 < coarse / fine < 3
    finite = widths.isfinite()
    assert _distance(sampler.law(0, CPU)[finite], expected[finite]) < 0.01
    assert _distance(expected[finite] / progress[finite], expected[finite]) > 0.05


def test_the_law_moves_to_detail_once_coarse_levels_are_learned() -> None:
    sampler = _build(bandwidth=0.1)
    log_snr = _log_snr(sampler)
    begin = np.where(log_snr < 0, 0, 500)  # detail begins to be learned later
    coarse = sampler.levels.positions < 0
    shares = []
    for step in range(1000):
        left = (np.clip(step, begin, begin + 500) - begin + 1.0) ** -0.3
        _show(sampler, x0_error(log_snr, 1.0) * left, step)
        if step in (400, 999):
            shares.append(float(sampler.law(0, CPU)[coarse].sum()))
    assert shares[0] > 0.95
    assert shares[1] < 0.1


@pytest.mark.parametrize("power", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("bottom", [0.0, 2.0])
def test_the_progress_of_a_power_law(power: float, bottom: float) -> None:
    """Of values bottom + n^-a the mean with weights (n / N)^k is bottom + N^-a (k+1) / (k+1-a)."""
    statistics, _ = _build(bandwidth=0.01)._present()
    assert isinstance(statistics, ProgressMeans)
    steps, state, indices = 1000, statistics.initial_state(), torch.arange(1000)
    for step in range(steps):
        values = torch.full((1000,), bottom + (step + 1.0) ** -power, dtype=torch.float64)
        statistics.add(state, indices, values, values > 0)
        statistics.fold(state)
    tail = steps**-power
    older, recent = (bottom + tail * (k + 1) / (k + 1 - power) for k in (1.0, 4.0))
    profile, (progress, _) = statistics.profile(state), statistics.progress(state)
    torch.testing.assert_close(profile, torch.full_like(profile, recent), rtol=2e-3, atol=0)
    expected = torch.full_like(progress, (older - recent) / recent)
    torch.testing.assert_close(progress, expected, rtol=0.02, atol=2e-4)


@pytest.mark.parametrize(("significance", "at_least", "at_most"), [(4, 0, 0.05), (0, 0.1, 1)])
def test_noise_is_no_progress(significance: float, at_least: float, at_most: float) -> None:
    """Losses that only scatter: the law is that of equal progress, not of where the dice fell."""
    sampler = _build("linear", prediction_type="v_prediction", significance=significance)
    error = x0_error(_log_snr(sampler), 0.3)
    law = _learn(sampler, error, steps=300, noise=0.5).law(0, CPU)
    calm = _learn(_build("linear", prediction_type="v_prediction"), error).law(0, CPU)
    assert at_least <= _distance(law, calm) <= at_most


def test_a_dip_among_noisy_levels_is_not_believed() -> None:
    """The error of x0 can only grow towards noise: where it does not, chance has it."""
    sampler = _build("linear", prediction_type="v_prediction", bandwidth=0.1)
    log_snr = _log_snr(sampler)
    error = x0_error(log_snr, 1.0)
    dipped = np.where((log_snr < -7) & (log_snr > -8), error / 2, error)
    law = _learn(sampler, dipped).law(0, CPU)
    assert float(law[torch.tensor((log_snr < -6.8) & (log_snr > -8.2))].sum()) < 1e-3


def test_an_epsilon_prediction_is_trained_in_noise_too() -> None:
    """Its law is of the size of errors, and half of the draws are uniform."""
    sampler = AutoTimestepSampler(SCHEDULERS["linear"](prediction_type="epsilon"))
    assert (sampler.config["sharpness"], sampler.floor) == (0.5, 0.5)
    other = AutoTimestepSampler(SCHEDULERS["linear"](prediction_type="v_prediction"))
    assert (other.config["sharpness"], other.floor) == (2.0, 0.1)
    given = AutoTimestepSampler(SCHEDULERS["linear"](), sharpness=1.5, floor=0.2)
    assert (given.config["sharpness"], given.floor) == (1.5, 0.2)


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
    assert _distance(law[levels], _half_known(base, 1.0, 2.0)[levels]) < 0.02
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
        ({"significance": -1.0}, "significance=-1.0"),
        ({"least_progress": 0.0}, "least_progress=0.0"),
        ({"floor": 0.0}, "floor=0.0"),
    ],
)
def test_wrong_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _build(**setting)
