"""Loss weights against worked values, an independent formula for each target, and diffusers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from diffusers_curriculum.weighting import WEIGHTINGS, log_weight, loss_weights
from diffusers_curriculum.weighting.formulas import softplus
from tests.floors_fixtures import SCHEDULERS, VARIANCE_PRESERVING, levels_of, table
from tests.weighting.oracle import FORMULAS, KINDS, expected, speed, weights_of

SNR = [100.0, 25.0, 1.0, 0.01]  # cleanest first
TARGETS = {"x0": "sample", "eps": "epsilon", "v": "v_prediction", "u": "flow"}

# at SNR 0.01, 1, 25, 100; x0, eps, v, u
WORKED: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "min_snr",
        {"gamma": 5},
        [
            "0.01 1 5 5",
            "1 1 0.2 0.05",
            "0.00990099 0.5 0.192308 0.0495050",
            "0.00826446 0.25 0.138889 0.0413223",
        ],
    ),
    (
        "soft_min_snr",
        {"gamma": 4},
        [
            "0.00997506 0.8 3.44828 3.84615",
            "0.997506 0.8 0.137931 0.0384615",
            "0.00987630 0.4 0.132626 0.0380807",
            "0.00824385 0.2 0.0957854 0.0317864",
        ],
    ),
    (
        "p2",
        {"k": 1, "gamma": 1},
        [
            "0.00990099 0.5 0.961538 0.990099",
            "0.990099 0.5 0.0384615 0.00990099",
            "0.00980296 0.25 0.0369822 0.00980296",
            "0.00818264 0.125 0.0267094 0.00818264",
        ],
    ),
    (
        "p2",
        {"k": 1, "gamma": 0.5},
        [
            "0.00995037 0.707107 4.90290 9.95037",
            "0.995037 0.707107 0.196116 0.0995037",
            "0.00985185 0.353553 0.188573 0.0985185",
            "0.00822345 0.176777 0.136192 0.0822345",
        ],
    ),
    (
        "debiased",
        {},
        [
            "0.1 1 5 10",
            "10 1 0.2 0.1",
            "0.0990099 0.5 0.192308 0.0990099",
            "0.0826446 0.25 0.138889 0.0826446",
        ],
    ),
    (
        "edm",
        {"sigma_data": 0.5},
        [
            "4.01 5 29 104",
            "401 5 1.16 1.04",
            "3.97030 2.5 1.11538 1.02970",
            "3.31405 1.25 0.805556 0.859504",
        ],
    ),
    (
        "sigmoid",
        {"bias": -1},
        [
            "0.00973537 0.268941 0.362545 0.366531",
            "0.973537 0.268941 0.0145018 0.00366531",
            "0.00963898 0.134471 0.0139440 0.00362902",
            "0.00804576 0.0672354 0.0100707 0.00302918",
        ],
    ),
    (
        "sigmoid",
        {"bias": 2},
        [
            "0.00998648 0.880797 5.70336 6.88064",
            "0.998648 0.880797 0.228134 0.0688064",
            "0.00988761 0.440399 0.219360 0.0681252",
            "0.00825329 0.220199 0.158427 0.0568648",
        ],
    ),
    (
        "cosmap",
        {"preconditioned": False},
        [
            "0.922847 5.09296 31.7330 92.2847",
            "92.2847 5.09296 1.26932 0.922847",
            "0.913709 2.54648 1.22050 0.913709",
            "0.762683 1.27324 0.881474 0.762683",
        ],
    ),
    (
        "unit_v",
        {},
        ["1.01 2 26 101", "101 2 1.04 1.01", "1 1 1 1", "0.834711 0.5 0.722222 0.834711"],
    ),
    ("unit_flow", {}, ["1.21 4 36 121", "121 4 1.44 1.21", "1.19802 2 1.38462 1.19802", "1 1 1 1"]),
]
IDS = [f"{name}{list(args.values())}" for name, args, _ in WORKED]

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FORMULAS),
    ("min_snr", {"gamma": 0.3}),
    ("min_snr_plus_one", {"gamma": 7}),
    ("soft_min_snr", {"gamma": 0.3}),
    ("p2", {"k": 0.4, "gamma": 1.7}),
    ("edm", {"sigma_data": 1.3}),
    ("sigmoid", {"bias": -2.5}),
    ("sigma_sqrt", {"preconditioned": True}),
    ("cosmap", {"preconditioned": True}),
    ("p2_onetrainer", {"gamma": 0.5}),
]


def _by_hand() -> Any:
    return table([math.log(s) for s in SNR])


@pytest.mark.parametrize("target", range(4), ids=list(TARGETS))
@pytest.mark.parametrize(("name", "args", "rows"), WORKED, ids=IDS)
def test_worked_values(name: str, args: dict[str, Any], rows: list[str], target: int) -> None:
    weights = weights_of(name, _by_hand(), list(TARGETS.values())[target], **args)
    worked = torch.tensor([float(v) for v in rows[target].split()]).flip(0)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, worked, atol=0, rtol=5e-6)  # six digits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "args"), SETTINGS, ids=str)
def test_the_formula_of_each_target(name: str, args: dict[str, Any], kind: str) -> None:
    snr = np.exp(np.random.default_rng(0).uniform(-9, 9, 200))
    oracle = expected(name, kind, snr, **args)
    log_snr = torch.from_numpy(np.log(snr))
    if oracle is None:
        with pytest.raises(ValueError, match=rf"'{name}' is defined for .* only, not for .*{kind}"):
            log_weight(name, log_snr, kind, **args)
        return
    found = log_weight(name, log_snr, kind, **args).exp()
    torch.testing.assert_close(found, torch.from_numpy(oracle), atol=0, rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "args", [{}, {"contrast": 0.9, "tau": 0.25}, {"contrast": 0.2, "tau": 1}, {"tau": 100}]
)
@pytest.mark.parametrize("schedule", ["linear", "sd", "cosine"])
def test_speed_is_that_of_the_loop(schedule: str, args: dict[str, Any], kind: str) -> None:
    levels = levels_of(schedule)
    found = weights_of("speed", levels, kind, **args)
    torch.testing.assert_close(
        found, torch.from_numpy(speed(levels, kind, **args)).float(), atol=1e-7, rtol=1e-6
    )


def test_speed_of_the_linear_schedule_by_figures() -> None:
    """0.6 where beta abar, the step of the noise power, is greatest; 1 from step 700 on."""
    weights = weights_of("speed", levels_of("linear"), "epsilon")
    scheduler = SCHEDULERS["linear"]()
    steepest = int((scheduler.betas * scheduler.alphas_cumprod).argmax())
    assert abs(int(weights[:700].argmax()) - steepest) <= 1
    assert float(weights[:700].max()) == pytest.approx(0.6, abs=1e-6)
    assert 0.4 <= float(weights[:700].min()) < 0.41
    assert torch.equal(weights[700:], torch.ones(300))


def test_every_weighting_has_an_oracle() -> None:
    assert set(WEIGHTINGS) == {*FORMULAS, "speed"}


def test_default_parameters() -> None:
    defaults: list[tuple[str, dict[str, Any]]] = [
        ("min_snr", {"gamma": 5.0}),
        ("min_snr_plus_one", {"gamma": 5.0}),
        ("soft_min_snr", {"gamma": 4.0}),
        ("p2", {"k": 1.0, "gamma": 1.0}),
        ("edm", {"sigma_data": 0.5}),
        ("sigmoid", {"bias": 0.0}),
        ("sigma_sqrt", {"preconditioned": False}),
        ("cosmap", {"preconditioned": False}),
        ("speed", {"contrast": 0.6, "tau": 0.7}),
    ]
    for name, args in defaults:
        given = weights_of(name, _by_hand(), "epsilon", **args)
        assert torch.equal(weights_of(name, _by_hand(), "epsilon"), given)


def test_the_catalogue_tells_of_every_weighting() -> None:
    for name, entry in zip(WEIGHTINGS, WEIGHTINGS.entries, strict=True):
        assert entry.name == name
        assert entry.make is WEIGHTINGS[name]
        assert entry.formula
        assert entry.source
        assert entry.families in ("all", "vp", "flow")
        assert (entry.formula + entry.source + entry.note).isascii()


FOLK = ("debiased_kohya", "debiased_onetrainer", "p2_onetrainer")  # another objective per target


@pytest.mark.parametrize(
    ("name", "args"), [s for s in [*SETTINGS, ("speed", {})] if s[0] not in FOLK], ids=str
)
def test_weighted_errors_are_one_number_for_all_targets(name: str, args: dict[str, Any]) -> None:
    """The same wrong x0, seen through each target, has the same weighted squared error."""
    generator = torch.Generator().manual_seed(0)
    x0, guess, noise = torch.randn(3, 4, 64, generator=generator, dtype=torch.float64)
    levels = _by_hand()
    t = 1 / (1 + (levels.log_snr / 2).exp())
    coefficients = {"flow": (1 - t, t)}
    totals = []
    for kind in KINDS:
        a, b = (c[:, None] for c in coefficients.get(kind, (levels.alpha, levels.sigma)))
        # the noise that a guess of x0 implies, given the same noisy input
        implied = (a * x0 + b * noise - a * guess) / b
        wrong, right = (
            {"sample": x, "epsilon": e, "v_prediction": a * e - b * x, "flow": e - x}[kind]
            for x, e in ((guess, implied), (x0, noise))
        )
        error = (wrong - right).square().mean(1)
        totals.append(weights_of(name, levels, kind, **args).double() * error)
    for total in totals[1:]:
        torch.testing.assert_close(total, totals[0], atol=0, rtol=5e-7)


@pytest.mark.parametrize("data", [0.5, 1.0, 0.3])
@pytest.mark.parametrize("name", sorted({*FORMULAS} - {*FOLK}))
def test_weights_on_the_output_of_edm(name: str, data: float) -> None:
    """F = (x0 - c_skip x) / c_out: a wrong x0 is wrong in F by 1 / c_out (arXiv 2206.00364)."""
    snr = np.exp(np.random.default_rng(1).uniform(-9, 9, 200))
    sigma = 1 / np.sqrt(snr)
    out = sigma * data / np.sqrt(sigma**2 + data**2)
    oracle = expected(name, "sample", snr)
    assert oracle is not None
    levels = replace(table([1.0, 0.0], "edm"), sigma_data=data)
    for kind in ("edm", "v_prediction"):
        found = log_weight(name, torch.from_numpy(np.log(snr)), kind, levels=levels).exp()
        torch.testing.assert_close(found, torch.from_numpy(oracle * out**2), atol=0, rtol=1e-10)


@pytest.mark.parametrize("name", sorted({*FORMULAS} - {*FOLK}))
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_edm_and_all_other_targets_are_one_objective(kind: str, name: str) -> None:
    """The ratio of two targets' weights is that of their squared errors, whatever the weighting."""
    log_snr = torch.linspace(-12, 12, 97, dtype=torch.float64)
    s, t = log_snr.exp().numpy(), (1 / (1 + (log_snr / 2).exp())).numpy()
    error = {"sample": s**0, "epsilon": s, "v_prediction": 1 + s, "flow": t**-2.0}[kind]
    levels = replace(table([1.0, 0.0], "edm"), sigma_data=0.5)
    on_edm = log_weight(name, log_snr, "edm", levels=levels).exp()
    other = log_weight(name, log_snr, kind).exp()
    found = on_edm * torch.from_numpy(s + 4) / (other * torch.from_numpy(error))
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-10, rtol=0)


def test_a_unit_loss_on_edm_is_the_weighting_edm_on_flow() -> None:
    """1 on F is S + 1 / sigma_data^2 on x0, as the table of the paper says."""
    log_snr = torch.linspace(-12, 12, 97, dtype=torch.float64)
    levels = replace(table([1.0, 0.0], "edm"), sigma_data=0.5)
    on_edm = log_weight("edm", log_snr, "edm", levels=levels, sigma_data=0.5).exp()
    torch.testing.assert_close(on_edm, torch.ones_like(on_edm), atol=1e-10, rtol=0)
    t = 1 / (1 + (log_snr / 2).exp())
    on_flow = log_weight("edm", log_snr, "flow", sigma_data=0.5).exp()
    torch.testing.assert_close(on_flow, t**2 * (log_snr.exp() + 4), atol=0, rtol=1e-10)


def test_levels_say_what_the_data_of_edm_are() -> None:
    levels = levels_of("edm", sigma_data=0.9)
    found = weights_of("edm", levels, "edm", sigma_data=0.9)
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-6, rtol=0)
    assert not torch.allclose(weights_of("edm", levels, "edm"), found, atol=0.1)
    with pytest.raises(ValueError, match="'edm' has no weight without sigma_data"):
        loss_weights("min_snr", levels_of("sd"), "edm")


def test_softplus_keeps_its_digits() -> None:
    x = torch.tensor([-700.0, -30, 0, 25, 40, 1e4], dtype=torch.float64)
    exact = [math.exp(-700), math.exp(-30), math.log(2), 25 + math.exp(-25), 40, 1e4]
    torch.testing.assert_close(
        softplus(x), torch.tensor(exact, dtype=torch.float64), atol=0, rtol=1e-12
    )


# -- families that coincide ------------------------------------------------------------------------

SAME: list[tuple[str, dict[str, Any], str, dict[str, Any], float]] = [
    ("soft_min_snr", {"gamma": 4}, "sigmoid", {"bias": math.log(4)}, 1),
    ("soft_min_snr", {"gamma": 5}, "sigmoid", {"bias": math.log(5)}, 1),
    ("p2", {"k": 1, "gamma": 1}, "soft_min_snr", {"gamma": 1}, 1),
    ("p2", {"k": 3, "gamma": 1}, "soft_min_snr", {"gamma": 3}, 1 / 3),
    ("edm", {"sigma_data": 1}, "unit_v", {}, 1),
    ("sigma_sqrt", {"preconditioned": True}, "unit_flow", {}, 1),
    ("min_snr", {"gamma": 1e9}, "unit_epsilon", {}, 1),
    ("min_snr_plus_one", {"gamma": 1e9}, "unit_v", {}, 1),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "args", "other", "others", "factor"), SAME, ids=str)
def test_families_that_coincide(
    name: str, args: dict[str, Any], other: str, others: dict[str, Any], factor: float, kind: str
) -> None:
    levels = levels_of("sd")
    torch.testing.assert_close(
        weights_of(name, levels, kind, **args),
        factor * weights_of(other, levels, kind, **others),
        atol=0,
        rtol=2e-6,
    )


def test_edm_with_the_data_scale_is_a_unit_loss_on_the_networks_output() -> None:
    """|F error|^2 = (1/sigma^2 + 1/sigma_data^2) |x0 error|^2, EDM's own parametrisation."""
    levels = levels_of("edm")
    per_x0 = 1 / levels.sigma**2 + 1 / 0.5**2
    torch.testing.assert_close(weights_of("edm", levels, "sample"), per_x0.float())


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
    ours = weights_of("min_snr", levels, kind, gamma=gamma)
    finite = theirs.isfinite()
    assert int((~finite).sum()) == int(kind == "epsilon" and schedule == "sd_zero_terminal")
    assert torch.equal(ours[finite], theirs[finite])
    assert bool(ours.isfinite().all())


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("schedule", ["flow", "flow_shift_3"])
def test_flow_weights_are_those_of_diffusers(
    schedule: str, name: str, preconditioned: bool
) -> None:
    levels = levels_of(schedule)
    theirs = compute_loss_weighting_for_sd3(name, levels.sigma)
    kind = "sample" if preconditioned else "flow"
    ours = weights_of(name, levels, kind, preconditioned=preconditioned)
    torch.testing.assert_close(ours, theirs.float(), atol=0, rtol=2e-6)


def test_the_bell_is_that_of_the_trainers() -> None:
    """Their arithmetic on 1000 unshifted timesteps: minimum taken away, mean 1; their grid begins
    at 0, ours at 1 / 1000, hence the tolerance."""
    timesteps = np.arange(1000.0)
    bell = np.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    bell = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    ours = weights_of("bell", levels_of("flow"), "flow").numpy()
    np.testing.assert_allclose(ours[:-1], bell[1:], atol=2e-3)
    assert ours.mean() == pytest.approx(1, abs=1e-5)
    normalised = weights_of("bell", levels_of("flow_shift_3"), "flow", normalise=True)
    assert float(normalised.mean()) == pytest.approx(1, abs=1e-6)
