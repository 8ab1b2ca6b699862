"""Loss weights against worked values, identities between targets, and diffusers' arithmetic."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import Tensor

from diffusers_curriculum.weighting import WEIGHTINGS, loss_weights, softplus
from tests.floors_fixtures import SCHEDULERS, VARIANCE_PRESERVING, levels_of, table

SNR = [100.0, 25.0, 1.0, 0.01]  # cleanest first
TARGETS = {"x0": "sample", "eps": "epsilon", "v": "v_prediction", "u": "flow"}

# at SNR 0.01, 1, 25, 100
WORKED: list[tuple[str, dict[str, float], dict[str, str]]] = [
    (
        "min_snr",
        {"gamma": 5},
        {
            "x0": "0.01 1 5 5",
            "eps": "1 1 0.2 0.05",
            "v": "0.00990099 0.5 0.192308 0.0495050",
            "u": "0.00826446 0.25 0.138889 0.0413223",
        },
    ),
    (
        "soft_min_snr",
        {"gamma": 4},
        {
            "x0": "0.00997506 0.8 3.44828 3.84615",
            "eps": "0.997506 0.8 0.137931 0.0384615",
            "v": "0.00987630 0.4 0.132626 0.0380807",
            "u": "0.00824385 0.2 0.0957854 0.0317864",
        },
    ),
    (
        "p2",
        {"k": 1, "gamma": 1},
        {
            "x0": "0.00990099 0.5 0.961538 0.990099",
            "eps": "0.990099 0.5 0.0384615 0.00990099",
            "v": "0.00980296 0.25 0.0369822 0.00980296",
            "u": "0.00818264 0.125 0.0267094 0.00818264",
        },
    ),
    (
        "p2",
        {"k": 1, "gamma": 0.5},
        {
            "x0": "0.00995037 0.707107 4.90290 9.95037",
            "eps": "0.995037 0.707107 0.196116 0.0995037",
            "v": "0.00985185 0.353553 0.188573 0.0985185",
            "u": "0.00822345 0.176777 0.136192 0.0822345",
        },
    ),
    (
        "debiased",
        {},
        {
            "x0": "0.1 1 5 10",
            "eps": "10 1 0.2 0.1",
            "v": "0.0990099 0.5 0.192308 0.0990099",
            "u": "0.0826446 0.25 0.138889 0.0826446",
        },
    ),
    (
        "sigmoid",
        {"bias": -1},
        {
            "x0": "0.00973537 0.268941 0.362545 0.366531",
            "eps": "0.973537 0.268941 0.0145018 0.00366531",
            "v": "0.00963898 0.134471 0.0139440 0.00362902",
            "u": "0.00804576 0.0672354 0.0100707 0.00302918",
        },
    ),
    (
        "sigmoid",
        {"bias": 2},
        {
            "x0": "0.00998648 0.880797 5.70336 6.88064",
            "eps": "0.998648 0.880797 0.228134 0.0688064",
            "v": "0.00988761 0.440399 0.219360 0.0681252",
            "u": "0.00825329 0.220199 0.158427 0.0568648",
        },
    ),
]
SETTINGS = [(name, args) for name, args, _ in WORKED]
IDS = [f"{name}{list(args.values())}" for name, args in SETTINGS]


def _weights(name: str, levels: Any, kind: str, **parameters: float) -> Tensor:
    weights = loss_weights(name, levels, kind, **parameters)
    assert weights is not None
    return weights


def _by_hand() -> Any:
    return table([math.log(s) for s in SNR])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "args", "rows"), WORKED, ids=IDS)
def test_worked_values(
    name: str, args: dict[str, float], rows: dict[str, str], target: str
) -> None:
    weights = _weights(name, _by_hand(), TARGETS[target], **args)
    expected = torch.tensor([float(v) for v in rows[target].split()]).flip(0)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, expected, atol=0, rtol=5e-6)  # six digits


def test_default_parameters() -> None:
    for name, args in [
        ("min_snr", {"gamma": 5.0}),
        ("soft_min_snr", {"gamma": 4.0}),
        ("p2", {"k": 1.0, "gamma": 1.0}),
        ("sigmoid", {"bias": 0.0}),
    ]:
        given = _weights(name, _by_hand(), "epsilon", **args)
        assert torch.equal(_weights(name, _by_hand(), "epsilon"), given)


def test_every_weighting_is_tested_here() -> None:
    assert set(WEIGHTINGS) == {name for name, _ in SETTINGS}


@pytest.mark.parametrize(("name", "args"), SETTINGS, ids=IDS)
def test_weighted_errors_are_one_number_for_all_targets(name: str, args: dict[str, float]) -> None:
    """The same wrong x0, seen through each target, has the same weighted squared error."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    snr = torch.tensor(SNR, dtype=torch.float64)[:, None]
    t = 1 / (1 + snr.sqrt())
    scales = {
        "sample": torch.ones_like(snr),
        "epsilon": snr.sqrt(),  # alpha / sigma
        "v_prediction": 1 / (1 / (1 + snr)).sqrt(),  # 1 / sigma
        "flow": 1 / t,
    }
    totals = [
        _weights(name, _by_hand(), kind, **args).double() * (scale * error).square().mean(1)
        for kind, scale in scales.items()
    ]
    for total in totals[1:]:
        torch.testing.assert_close(total, totals[0], atol=0, rtol=5e-7)


def test_soft_min_on_epsilon_is_a_sigmoid() -> None:
    levels = levels_of("sd")
    expected = torch.sigmoid(math.log(4.0) - levels.log_snr).float()
    torch.testing.assert_close(
        _weights("soft_min_snr", levels, "epsilon"), expected, atol=0, rtol=1e-6
    )


def test_softplus_keeps_its_digits() -> None:
    x = torch.tensor([-700.0, -30, 0, 25, 40, 1e4], dtype=torch.float64)
    expected = [math.exp(-700), math.exp(-30), math.log(2), 25 + math.exp(-25), 40, 1e4]
    torch.testing.assert_close(
        softplus(x), torch.tensor(expected, dtype=torch.float64), atol=0, rtol=1e-12
    )


# -- the limits ------------------------------------------------------------------------------------

# (weighting, target) -> limits at SNR 0 and infinity; None is infinite
LIMITS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("min_snr", "sample"): (0, 5),
    ("min_snr", "epsilon"): (1, 0),
    ("min_snr", "v_prediction"): (0, 0),
    ("min_snr", "flow"): (0, 0),
    ("soft_min_snr", "sample"): (0, 4),
    ("soft_min_snr", "epsilon"): (1, 0),
    ("soft_min_snr", "v_prediction"): (0, 0),
    ("soft_min_snr", "flow"): (0, 0),
    ("p2", "sample"): (0, 1),
    ("p2", "epsilon"): (1, 0),
    ("p2", "v_prediction"): (0, 0),
    ("p2", "flow"): (0, 0),
    ("debiased", "sample"): (0, None),
    ("debiased", "epsilon"): (None, 0),
    ("debiased", "v_prediction"): (0, 0),
    ("debiased", "flow"): (0, 0),
    ("sigmoid", "sample"): (0, 1),
    ("sigmoid", "epsilon"): (1, 0),
    ("sigmoid", "v_prediction"): (0, 0),
    ("sigmoid", "flow"): (0, 0),
}


def test_limits_are_given_for_every_pair() -> None:
    assert set(LIMITS) == set(product(WEIGHTINGS, TARGETS.values()))


@pytest.mark.parametrize("family", ["vp", "flow", "edm"])
@pytest.mark.parametrize(("name", "kind"), LIMITS)
def test_weights_at_snr_zero_and_infinity(name: str, kind: str, family: str) -> None:
    for end, limit in zip((-torch.inf, torch.inf), LIMITS[name, kind], strict=True):
        finite = [2.0, 0.0, -2.0]
        levels = table([*finite, end] if end < 0 else [end, *finite], family)
        if limit is None:
            with pytest.raises(ValueError, match=f"'{name}' on {kind} is infinite at 1 of"):
                loss_weights(name, levels, kind)
        else:
            weights = _weights(name, levels, kind)
            assert bool(weights.isfinite().all())
            found = float(weights[-1] if end < 0 else weights[0])
            assert found == pytest.approx(limit, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("schedule", sorted(SCHEDULERS))
@pytest.mark.parametrize(("name", "kind"), LIMITS)
def test_weights_of_real_schedules_are_finite_or_refused(
    name: str, kind: str, schedule: str
) -> None:
    levels = levels_of(schedule)
    if LIMITS[name, kind][0] is None and not bool(levels.finite.all()):
        with pytest.raises(ValueError, match=r"zero terminal SNR"):
            loss_weights(name, levels, kind)
        return
    weights = _weights(name, levels, kind)
    assert bool(weights.isfinite().all())
    assert bool((weights >= 0).all())


def test_a_weight_beyond_float32_is_refused() -> None:
    levels = table([2.0, 0.0, -200.0])
    with pytest.raises(ValueError, match=r"infinite at 1 of .*index 2, log-SNR -200"):
        loss_weights("debiased", levels, "epsilon")
    infinite = table([torch.inf, 1.0, 0.0])
    with pytest.raises(ValueError, match="infinite"):
        loss_weights("p2", infinite, "sample", gamma=0.99)


# -- diffusers' own arithmetic ---------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING)
def test_min_snr_is_that_of_diffusers_bit_for_bit(schedule: str, kind: str, gamma: float) -> None:
    scheduler, levels = SCHEDULERS[schedule](prediction_type=kind), levels_of(schedule)
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    clipped = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    theirs = clipped / (snr if kind == "epsilon" else snr + 1)
    ours = _weights("min_snr", levels, kind, gamma=gamma)
    finite = theirs.isfinite()
    assert int((~finite).sum()) == int(kind == "epsilon" and schedule == "sd_zero_terminal")
    assert torch.equal(ours[finite], theirs[finite])
    assert bool(ours.isfinite().all())


# -- errors ----------------------------------------------------------------------------------------


def test_none_weighs_nothing() -> None:
    assert loss_weights("none", levels_of("sd")) is None


def test_the_levels_prediction_type_is_the_default() -> None:
    levels = levels_of("sd", prediction_type="v_prediction")
    assert torch.equal(
        _weights("min_snr", levels, "v_prediction"),
        loss_weights("min_snr", levels),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("name", "kind", "parameters", "message"),
    [
        ("max_snr", None, {}, r"'max_snr' is unknown.*none, min_snr"),
        ("none", None, {"gamma": 5}, r"'none' is unknown or takes no parameters"),
        ("min_snr", None, {"k": 1}, r"'min_snr' has no parameter 'k': it takes \['gamma'\]"),
        ("debiased", None, {"gamma": 1}, r"'debiased' has no parameter 'gamma': it takes none"),
        ("min_snr", "score", {}, r"prediction_type='score' has no weight: use one of sample"),
        ("min_snr", None, {"gamma": 0}, r"gamma=0 must be a number greater than 0"),
        ("min_snr", None, {"gamma": -5.0}, r"gamma=-5.0"),
        ("soft_min_snr", None, {"gamma": math.inf}, r"gamma=inf"),
        ("p2", None, {"k": -1}, r"k=-1"),
        ("p2", None, {"gamma": math.nan}, r"gamma=nan"),
        ("p2", None, {"gamma": "1"}, r"gamma='1'"),
        ("sigmoid", None, {"bias": math.nan}, r"bias=nan"),
        ("sigmoid", None, {"bias": "0"}, r"bias='0'"),
    ],
)
def test_wrong_names_and_numbers_are_refused(
    name: str, kind: str | None, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss_weights(name, levels_of("sd"), kind, **parameters)
