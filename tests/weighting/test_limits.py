"""Loss weights at zero and infinite SNR; finite and not negative everywhere, or refused."""

from __future__ import annotations

import functools
import math
from itertools import product
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.weighting import WEIGHTINGS, loss_weights
from tests.floors_fixtures import SD, table
from tests.weighting.oracle import KINDS, LIMITS, weights_of

ENDS = (-torch.inf, torch.inf)
DEFINED = {(name, kind) for name, kind in product(WEIGHTINGS, KINDS) if (name, kind) in LIMITS}


def test_limits_are_given_for_every_pair() -> None:
    assert {name for name, _ in LIMITS} == set(WEIGHTINGS) - {"speed"}
    undefined = [pair for pair in product(WEIGHTINGS, KINDS) if pair not in LIMITS]
    assert len(undefined) == 2 + 2 + 3 + 4  # debiased_kohya, _onetrainer, p2_onetrainer, speed


@pytest.mark.parametrize("family", ["vp", "flow", "edm"])
@pytest.mark.parametrize(("name", "kind"), sorted(DEFINED))
def test_weights_at_snr_zero_and_infinity(name: str, kind: str, family: str) -> None:
    for end, limit in zip(ENDS, LIMITS[name, kind], strict=True):
        finite = [2.0, 0.0, -2.0]
        levels = table([*finite, end] if end < 0 else [end, *finite], family)
        if limit is None:
            with pytest.raises(ValueError, match=f"'{name}' on {kind} is infinite at 1 of"):
                loss_weights(name, levels, kind)
        else:
            found = weights_of(name, levels, kind)[-1 if end < 0 else 0]
            assert float(found) == pytest.approx(limit, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_speed_at_zero_snr_is_one_on_epsilon(kind: str) -> None:
    """Beyond tau the weight on epsilon is 1, and all others follow from it: 0 at zero SNR."""
    weights = weights_of("speed", levels("ddpm_zero_terminal"), kind)
    assert float(weights[-1]) == (1.0 if kind == "epsilon" else 0.0)


@pytest.mark.parametrize(
    ("gamma", "limit"), [(0.5, None), (0.99, None), (1.0, 1.0), (1.01, 0.0), (2.0, 0.0)]
)
def test_p2_on_x0_at_infinite_snr(gamma: float, limit: float | None) -> None:
    at = table([torch.inf, 1.0, 0.0, -1.0])
    if limit is None:
        with pytest.raises(ValueError, match="infinite at 1 of"):
            loss_weights("p2", at, "sample", gamma=gamma)
    else:
        assert float(weights_of("p2", at, "sample", gamma=gamma)[0]) == pytest.approx(limit)


def test_a_weight_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"infinite at 1 of .*index 2, log-SNR -200"):
        loss_weights("debiased", table([2.0, 0.0, -200.0]), "epsilon")


# -- finite everywhere, or refused at construction -------------------------------------------------

SCHEDULES: dict[str, Any] = {
    "ddpm": lambda: diffusers.DDPMScheduler(),
    "ddim": lambda: diffusers.DDIMScheduler(**SD, clip_sample=False),
    "ddpm_cosine": lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "ddpm_zero_terminal": lambda: diffusers.DDPMScheduler(**SD, rescale_betas_zero_snr=True),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SD),
    "euler_zero_terminal": lambda: diffusers.EulerDiscreteScheduler(
        **SD, rescale_betas_zero_snr=True
    ),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow_shift_3": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": lambda: diffusers.EDMEulerScheduler(),
}
ZERO_SNR = {"ddpm_zero_terminal", "flow", "flow_shift_3"}


@functools.cache
def levels(schedule: str) -> NoiseLevels:
    return NoiseLevels.from_scheduler(SCHEDULES[schedule]())


def must_be_refused(name: str, kind: str, schedule: str, measure: str) -> bool:
    """By the table of limits: infinite at zero SNR, or (per log-SNR) not vanishing there."""
    if (name, kind) not in LIMITS and name != "speed":
        return True
    if schedule not in ZERO_SNR:
        return False
    limit = (1.0 if kind == "epsilon" else 0.0) if name == "speed" else LIMITS[name, kind][0]
    return limit is None or (measure == "log_snr" and limit > 0)


def check_finite_or_refused(name: str, kind: str, schedule: str, **options: Any) -> None:
    refused = must_be_refused(name, kind, schedule, options.get("measure", "draw"))
    if options.get("terminal_weight") is not None:
        refused = schedule not in ZERO_SNR or ((name, kind) not in LIMITS and name != "speed")
    if refused:
        with pytest.raises(ValueError, match=r"infinite at|is defined for|has no effect"):
            loss_weights(name, levels(schedule), kind, **options)
        return
    weights = weights_of(name, levels(schedule), kind, **options)
    assert weights.shape == (len(levels(schedule)),)
    assert weights.dtype == torch.float32
    assert bool(weights.isfinite().all())
    assert bool((weights >= 0).all())
    assert bool((weights[:-1] > 0).all())  # only at the terminal level is 0 a limit


@pytest.mark.parametrize("measure", ["draw", "log_snr"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_finite_everywhere_at_the_defaults(kind: str, schedule: str, measure: str) -> None:
    for name in WEIGHTINGS:
        check_finite_or_refused(name, kind, schedule, measure=measure)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log(low), math.log(high)).map(math.exp) | st.just(1)


PARAMETERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "min_snr": {"gamma": numbers(1e-6, 1e6)},
    "min_snr_plus_one": {"gamma": numbers(1e-6, 1e6)},
    "soft_min_snr": {"gamma": numbers(1e-6, 1e6)},
    "p2": {"k": numbers(1e-3, 1e3), "gamma": numbers(0.05, 2)},
    "p2_onetrainer": {"gamma": numbers(0.05, 2)},
    "edm": {"sigma_data": numbers(1e-2, 1e2)},
    "sigmoid": {"bias": st.floats(-15, 15)},
    "sigma_sqrt": {"preconditioned": st.booleans()},
    "cosmap": {"preconditioned": st.booleans()},
    "speed": {"contrast": st.floats(0.01, 0.99), "tau": st.floats(0, 1)},
}


@st.composite
def combinations(draw: st.DrawFn) -> tuple[str, str, str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(WEIGHTINGS)))
    known = PARAMETERS.get(name, {})
    options: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=known))
    if draw(st.booleans()):
        options["normalise"] = True
    if draw(st.booleans()):
        options["measure"] = "log_snr"
    if draw(st.integers(0, 3)) == 0:
        options["terminal_weight"] = draw(st.sampled_from([0, 1, 0.25]))
    return name, draw(st.sampled_from(KINDS)), draw(st.sampled_from(sorted(SCHEDULES))), options


@settings(max_examples=300, deadline=None)
@given(combinations())
def test_weights_finite_everywhere(combination: tuple[str, str, str, dict[str, Any]]) -> None:
    """Every weighting x schedule x prediction type x option, at all levels."""
    name, kind, schedule, options = combination
    check_finite_or_refused(name, kind, schedule, **options)
