"""Bugs of other code bases: each check rejects the wrong version, which stands beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_curriculum.weighting import log_weight, loss_weights
from tests.floors_fixtures import levels_of, table

Weigh = Callable[[Tensor], Tensor]  # weights of a table of SNRs, cleanest first


def ours(name: str, kind: str) -> Weigh:
    return lambda snr: log_weight(name, snr.double().log(), kind).exp()


def rejects(check: Callable[[Weigh], None], wrong: Weigh) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


# -- min-SNR at zero terminal SNR ------------------------------------------------------------------


def check_epsilon_at_zero_snr(weigh: Weigh) -> None:
    weights = weigh(torch.tensor([10.0, 1.0, 0.0]))
    assert bool(weights.isfinite().all()), "0/0 at zero SNR"
    assert float(weights[-1]) == pytest.approx(1, abs=1e-12)


def test_min_snr_on_epsilon_at_zero_terminal_snr_is_not_nan() -> None:
    """min(S, g) / S is 0/0 there; the limit is 1 (kohya-ss/sd-scripts 934, diffusers' scripts)."""
    check_epsilon_at_zero_snr(ours("min_snr", "epsilon"))
    rejects(check_epsilon_at_zero_snr, lambda snr: snr.clamp_max(5) / snr)
    table_weights = loss_weights("min_snr", levels_of("sd_zero_terminal"), "epsilon")
    assert table_weights is not None
    assert float(table_weights[-1]) == 1


def check_terminal_level_is_trained(weigh: Weigh) -> None:
    weights = weigh(torch.tensor([10.0, 1.0, 0.0]))
    assert bool(weights.isfinite().all())
    assert float(weights[-1]) > 0, "all-zero weight at zero terminal SNR"


def with_terminal_weight(snr: Tensor) -> Tensor:
    levels = table(snr.double().log())
    weights = loss_weights("min_snr", levels, "v_prediction", terminal_weight=1)
    assert weights is not None
    return weights


def test_v_prediction_can_be_trained_at_zero_terminal_snr() -> None:
    """min-SNR on v is 0 there (diffusers 9451): a batch of that level alone has no gradient. The
    limit stays the default; terminal_weight, or the variant with + 1, trains the level."""
    check_terminal_level_is_trained(with_terminal_weight)
    check_terminal_level_is_trained(ours("min_snr_plus_one", "v_prediction"))
    rejects(check_terminal_level_is_trained, ours("min_snr", "v_prediction"))
    rejects(check_terminal_level_is_trained, lambda snr: snr.clamp_max(5) / (snr + 1))


def check_plus_one(weigh: Weigh) -> None:
    weights = weigh(torch.tensor([99.0, 4.0, 1.0, 0.0]))
    torch.testing.assert_close(weights.double(), torch.tensor([0.05, 1, 1, 1], dtype=torch.float64))


def test_the_plus_one_variant_adds_to_the_snr_and_not_to_the_weight() -> None:
    """diffusers 5096 added 1 to the weight, 5238 to the SNR, 6307 to the denominator alone."""
    check_plus_one(ours("min_snr_plus_one", "v_prediction"))
    rejects(check_plus_one, lambda snr: snr.clamp_max(5) / snr + 1)
    rejects(check_plus_one, lambda snr: snr.clamp_max(5) / (snr + 1))


# -- SpeeD's min-SNR baseline ----------------------------------------------------------------------


def check_min_snr_on_v(weigh: Weigh) -> None:
    snr = torch.tensor([1000.0, 25.0, 5.0, 1.0, 0.005])
    closed = torch.tensor([5 / 1001, 5 / 26, 5 / 6, 1 / 2, 0.005 / 1.005], dtype=torch.float64)
    torch.testing.assert_close(weigh(snr).double(), closed, atol=0, rtol=1e-6)


def min_over_the_wrong_axis(snr: Tensor) -> Tensor:
    stacked = np.stack([snr.numpy(), 5 * np.ones_like(snr.numpy())], axis=1)
    return torch.from_numpy(stacked.min(axis=0)[1] / (snr.numpy() + 1))


def test_min_snr_takes_the_minimum_at_each_level() -> None:
    """SpeeD's port takes one scalar minimum for the whole schedule: 4.975 where 0.005 is right."""
    check_min_snr_on_v(ours("min_snr", "v_prediction"))
    rejects(check_min_snr_on_v, min_over_the_wrong_axis)
    snr = torch.tensor([1000.0, 25.0, 5.0, 1.0, 0.005])
    assert float(min_over_the_wrong_axis(snr)[-1]) == pytest.approx(4.975, abs=5e-4)
    assert float(ours("min_snr", "v_prediction")(snr)[-1]) == pytest.approx(0.005, abs=5e-5)


# -- "debiased" for v ------------------------------------------------------------------------------

DEBIASED_V = {  # at SNR 0.01, 1, 25, 100
    "debiased": [0.09901, 0.5, 0.19231, 0.09901],
    "debiased_kohya": [0.99010, 0.5, 0.03846, 0.00990],
    "debiased_onetrainer": [0.99504, 0.70711, 0.19612, 0.09950],
}


def check_debiased_is_one_objective(weigh: Weigh) -> None:
    """The weight on v times |v error|^2 is the paper's 1 / sqrt S times |eps error|^2."""
    snr = torch.tensor([100.0, 25.0, 1.0, 0.01], dtype=torch.float64)
    on_epsilon = weigh(snr) * (1 + 1 / snr)  # |v error|^2 = (1 + 1/S) |eps error|^2
    torch.testing.assert_close(on_epsilon, snr.rsqrt(), atol=0, rtol=1e-9)


def test_debiased_v_has_three_answers_under_three_names() -> None:
    """sd-scripts has 1 / (1 + S), OneTrainer 1 / sqrt(1 + S); the conversion of the paper's weight
    is sqrt S / (1 + S)."""
    for name, values in DEBIASED_V.items():
        found = ours(name, "v_prediction")(torch.tensor([0.01, 1, 25, 100]))
        assert found.tolist() == pytest.approx(values, abs=5.1e-6)
    check_debiased_is_one_objective(ours("debiased", "v_prediction"))
    rejects(check_debiased_is_one_objective, ours("debiased_kohya", "v_prediction"))
    rejects(check_debiased_is_one_objective, ours("debiased_onetrainer", "v_prediction"))


def check_p2_is_one_objective(weigh: Weigh) -> None:
    snr = torch.tensor([100.0, 25.0, 1.0, 0.01], dtype=torch.float64)
    torch.testing.assert_close(weigh(snr) * (1 + 1 / snr), 1 / (1 + snr), atol=0, rtol=1e-9)


def test_p2_for_v_adds_one_once() -> None:
    """OneTrainer adds 1 to the SNR, and 1 again: 0.498 where 0.0098 is right (SNR 0.01)."""
    check_p2_is_one_objective(ours("p2", "v_prediction"))
    rejects(check_p2_is_one_objective, ours("p2_onetrainer", "v_prediction"))
    low = torch.tensor([0.01])
    assert float(ours("p2", "v_prediction")(low)) == pytest.approx(0.0098, abs=5e-5)
    assert float(ours("p2_onetrainer", "v_prediction")(low)) == pytest.approx(0.498, abs=5e-4)


# -- the sigmoid on the wrong target ---------------------------------------------------------------


def check_sigmoid_is_one_objective(weigh: Weigh) -> None:
    snr = torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64)
    torch.testing.assert_close(weigh(snr), 1 / (1 + snr * np.exp(-2)), atol=0, rtol=1e-9)


def test_sigmoid_on_epsilon_falls_with_the_snr() -> None:
    """sigmoid(l - b) is the factor of the x0 error; on the epsilon error it is sigmoid(b - l)."""
    check_sigmoid_is_one_objective(
        lambda snr: log_weight("sigmoid", snr.log(), "epsilon", bias=2).exp()
    )
    rejects(check_sigmoid_is_one_objective, lambda snr: torch.sigmoid(snr.log() - 2))


def check_sd3_weight_is_squared(weigh: Weigh) -> None:
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = weigh(((1 - t) / t).square())
    torch.testing.assert_close(found, 1 / t**2, atol=0, rtol=1e-9)


def test_sigma_sqrt_is_sigma_to_the_minus_two() -> None:
    """Neither a square root, as the name says, nor the weight of x0 taken for that of velocity."""
    check_sd3_weight_is_squared(ours("sigma_sqrt", "flow"))
    rejects(check_sd3_weight_is_squared, ours("sigma_sqrt", "sample"))
    rejects(check_sd3_weight_is_squared, lambda snr: (1 + snr.sqrt()).sqrt())
