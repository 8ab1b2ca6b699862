"""Laws that are learned in bins from exact losses of Gaussian data, against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.weighting import loss_weights
from tests.floors_fixtures import SCHEDULERS
from tests.samplers.adaptive_fixtures import build, teach
from tests.samplers.test_adaptive_laws import PER_X0, information_law, x0_error

CPU = torch.device("cpu")
VARIANCE = 0.3**2
TARGETS = {
    "linear": ("epsilon", "v_prediction", "sample"),
    "sd": ("epsilon", "v_prediction", "sample"),
    "cosine": ("epsilon", "v_prediction", "sample"),
    "sd_zero_terminal": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow", "epsilon", "sample"),
    "flow_shift_3": ("flow", "epsilon", "sample"),
    "edm": ("edm", "sample"),
}
CASES = [(schedule, kind) for schedule, kinds in TARGETS.items() for kind in kinds]
each_case = pytest.mark.parametrize(("schedule", "kind"), CASES)


def _weights(levels: NoiseLevels, weighting: str, kind: str) -> np.ndarray:
    weights = loss_weights(weighting, levels, kind)
    return np.ones(len(levels)) if weights is None else weights.double().numpy()


def _distance(law: Any, expected: Any, where: Any) -> float:
    """Total variation between two laws on some of the levels."""
    p, q = (np.asarray(x)[where] for x in (law, expected))
    return float(np.abs(p / p.sum() - q / q.sum()).sum() / 2)


def _learned(
    sampler: str, schedule: str, kind: str, weighting: str, **settings: Any
) -> tuple[Any, np.ndarray]:
    """A sampler with its default bins that saw the exact loss of every level, and those losses."""
    levels = NoiseLevels.from_scheduler(SCHEDULERS[schedule]())
    settings |= {"prediction_type": kind, "loss_weighting": weighting}
    learner = build(sampler, schedule, **settings)
    lam = levels.log_snr.numpy()
    losses = PER_X0[kind](np.exp(lam)) * x0_error(lam, VARIANCE)
    teach(learner, torch.tensor(losses))
    return learner, losses


@pytest.mark.parametrize("weighting", ["none", "min_snr", "unit_epsilon"])
@each_case
def test_the_information_rate_of_each_target(schedule: str, kind: str, weighting: str) -> None:
    sampler, _ = _learned("information", schedule, kind, weighting)
    lam = sampler.levels.log_snr.numpy()
    per_x0 = PER_X0[kind](np.exp(lam)) * _weights(sampler.levels, weighting, kind)
    expected = information_law(sampler, per_x0, VARIANCE)
    # the share of a level at infinity is this library's choice: compare the others
    assert _distance(sampler.law(0, CPU), expected, np.isfinite(lam)) < 0.02


RULES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "second_moment": lambda weights, losses: weights * losses,
    "proportional": lambda weights, losses: weights * losses,
    "gradient_surrogate": lambda weights, losses: weights * np.sqrt(losses),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weighting", ["none", "min_snr", "unit_epsilon"])
@each_case
def test_laws_of_the_size_of_the_loss(rule: str, schedule: str, kind: str, weighting: str) -> None:
    more = {"proportional": {"measure": "draw"}, "gradient_surrogate": {"bins": 64}}
    sampler, losses = _learned(rule, schedule, kind, weighting, **more.get(rule, {}))
    expected = RULES[rule](_weights(sampler.levels, weighting, kind), losses)
    assert _distance(sampler.law(0, CPU), expected, slice(None)) < 0.025
