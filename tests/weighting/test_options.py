"""Measure, normalisation, terminal weight, and what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_curriculum.densities import UniformTimestep
from diffusers_curriculum.noise_levels import NoiseLevels, cell_edges
from diffusers_curriculum.weighting import WEIGHTINGS, log_weight, loss_weights, register
from tests.floors_fixtures import SCHEDULERS, levels_of, table
from tests.weighting.oracle import weights_of

# -- the measure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "sd", "cosine", "edm"])
def test_per_log_snr_divides_by_the_density_of_uniform_timesteps(schedule: str) -> None:
    levels = levels_of(schedule)
    density = UniformTimestep(levels.edges).pdf(levels.log_snr)
    plain = weights_of("sigmoid", levels, "v_prediction", bias=1)
    found = weights_of("sigmoid", levels, "v_prediction", bias=1, measure="log_snr")
    torch.testing.assert_close(found.double() * density, plain.double(), atol=0, rtol=1e-6)


def test_per_log_snr_in_flow_matching_is_the_published_factor() -> None:
    """W_flow 2 / (t (1 - t)): the steps are 1/1000 wide, so the interior agrees to about 1e-3."""
    levels = levels_of("flow")
    t = levels.sigma[20:-20]
    closed = weights_of("sigmoid", levels, "flow", bias=1)[20:-20] * 2 / (t * (1 - t))
    found = weights_of("sigmoid", levels, "flow", bias=1, measure="log_snr")[20:-20]
    torch.testing.assert_close(found, closed.float(), atol=0, rtol=2e-3)


def test_per_log_snr_the_mean_weight_is_the_integral_over_log_snr() -> None:
    """Integral of sigmoid(-l) dl from a to b = softplus(-a) - softplus(-b)."""
    levels = levels_of("cosine")
    high, low = float(levels.edges[0]), float(levels.edges[-1])
    integral = math.log1p(math.exp(-low)) - math.log1p(math.exp(-high))
    mean = float(weights_of("sigmoid", levels, "epsilon", measure="log_snr").double().mean())
    assert mean == pytest.approx(integral, rel=2e-3)


@pytest.mark.parametrize("outer_edges", ["clip", "inf"])
def test_per_log_snr_does_not_depend_on_the_outer_edges(outer_edges: str) -> None:
    half, other = levels_of("sd"), levels_of("sd", outer_edges)
    assert not torch.equal(half.edges, other.edges)
    one, two = (weights_of("p2", x, "epsilon", measure="log_snr") for x in (half, other))
    assert torch.equal(one, two)


def test_per_log_snr_at_zero_snr_is_the_limit() -> None:
    """debiased on the flow velocity is t (1 - t), times 2 / (t (1 - t)): 2 at every level."""
    weights = weights_of("debiased", levels_of("flow"), "flow", measure="log_snr")
    assert float(weights[-1]) == pytest.approx(2, rel=2e-3)
    assert float(weights[-100]) == pytest.approx(2, rel=2e-3)


def test_per_log_snr_at_infinite_snr_is_the_limit() -> None:
    """The mirror image: a schedule that ends at sigma = 0, cleanest level t = 0."""
    t = torch.arange(1000, dtype=torch.float64) / 1000
    levels = table(2 * ((1 - t) / t).log(), "flow")
    weights = weights_of("debiased", levels, "flow", measure="log_snr")
    assert float(weights[0]) == pytest.approx(2, rel=2e-3)
    with pytest.raises(ValueError, match="infinite at 1 of"):
        loss_weights("unit_flow", levels, measure="log_snr", prediction_type="flow")


def test_min_snr_per_log_snr_follows_the_formula() -> None:
    levels = levels_of("sd")
    width = -cell_edges(levels.log_snr).diff() * 1000
    closed = levels.log_snr.exp().clamp_max(5) * width
    found = weights_of("min_snr", levels, "sample", measure="log_snr")
    torch.testing.assert_close(found, closed.float(), atol=0, rtol=1e-6)
    for kind, divisor in {"epsilon": 0, "v_prediction": 1}.items():
        found = weights_of("min_snr", levels, kind, measure="log_snr")
        snr = levels.log_snr.exp()
        torch.testing.assert_close(found, (closed / (snr + divisor)).float(), atol=0, rtol=1e-6)


# -- normalisation ---------------------------------------------------------------------------------


def some_masses(count: int) -> Tensor:
    weights = torch.arange(1, count + 1, dtype=torch.float64)
    return weights / weights.sum()


@pytest.mark.parametrize("name", sorted(set(WEIGHTINGS) - {"p2_onetrainer"}))
def test_normalised_weights_have_mean_one(name: str) -> None:
    levels = levels_of("sd")
    plain = weights_of(name, levels, "epsilon").double()
    uniform = weights_of(name, levels, "epsilon", normalise=True).double()
    assert float(uniform.mean()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(uniform * plain.mean(), plain, atol=0, rtol=1e-6)
    for masses in (some_masses(1000), some_masses(1000).float()):
        given = weights_of(name, levels, "epsilon", normalise=True, masses=masses).double()
        assert float((some_masses(1000) * given).sum()) == pytest.approx(1, abs=1e-5)


def test_normalising_counts_the_terminal_weight() -> None:
    levels = levels_of("sd_zero_terminal")
    only_terminal = torch.zeros(1000).index_fill(0, torch.tensor([999]), 1.0)
    options: dict[str, Any] = {"normalise": True, "masses": only_terminal}
    weights = weights_of("min_snr", levels, "v_prediction", terminal_weight=4, **options)
    plain = weights_of("min_snr", levels, "v_prediction")
    assert float(weights[-1]) == 1.0
    torch.testing.assert_close(weights[:-1], plain[:-1] / 4)
    with pytest.raises(ValueError, match="0 at every level that is drawn"):
        loss_weights("min_snr", levels, "v_prediction", **options)


# -- the terminal level ----------------------------------------------------------------------------


def test_terminal_weight_replaces_the_limit_and_nothing_else() -> None:
    levels = levels_of("sd_zero_terminal")
    plain = weights_of("min_snr", levels, "v_prediction")
    changed = weights_of("min_snr", levels, "v_prediction", terminal_weight=0.5)
    assert (float(plain[-1]), float(changed[-1])) == (0.0, 0.5)
    assert torch.equal(changed[:-1], plain[:-1])


@pytest.mark.parametrize("name", ["unit_sample", "debiased", "edm", "debiased_kohya"])
def test_terminal_weight_admits_what_is_infinite_there(name: str) -> None:
    levels = levels_of("sd_zero_terminal")
    with pytest.raises(ValueError, match=r"infinite at 1 of .*give terminal_weight"):
        loss_weights(name, levels, "epsilon")
    weights = weights_of(name, levels, "epsilon", terminal_weight=3)
    assert float(weights[-1]) == 3
    assert bool(weights.isfinite().all())


def test_terminal_weight_does_not_hide_another_infinite_level() -> None:
    levels = table([2.0, 0.0, -200.0, -torch.inf])
    with pytest.raises(ValueError, match=r"infinite at 1 of .*index 2, log-SNR -200.0\): use min"):
        loss_weights("debiased", levels, "epsilon", terminal_weight=1)
    with pytest.raises(ValueError, match=r"infinite at 2 of .*index 2, log-SNR -200.0\): use min"):
        loss_weights("debiased", levels, "epsilon")


def test_infinite_per_log_snr_says_so() -> None:
    with pytest.raises(ValueError, match=r"per unit of log-SNR is infinite .*measure='draw', give"):
        loss_weights("min_snr", levels_of("sd_zero_terminal"), "epsilon", measure="log_snr")


# -- names and numbers -----------------------------------------------------------------------------


def test_none_weighs_nothing() -> None:
    assert loss_weights("none", levels_of("sd")) is None


def test_the_levels_prediction_type_is_the_default() -> None:
    levels = levels_of("sd", prediction_type="v_prediction")
    for name in ("min_snr", "debiased_kohya"):
        own = loss_weights(name, levels)
        assert own is not None
        assert torch.equal(weights_of(name, levels, "v_prediction"), own)
        assert not torch.equal(weights_of(name, levels, "epsilon"), own)


WRONG: list[tuple[str, str | None, dict[str, Any], str]] = [
    ("max-snr", None, {}, r"'max-snr' is unknown.*none, .*max_snr"),
    ("none", None, {"gamma": 5}, r"'none' has no weights, parameters or options"),
    ("none", None, {"normalise": True}, r"'none' has no weights, parameters or options"),
    ("none", None, {"measure": "log_snr"}, r"'none' has no weights, parameters or options"),
    ("none", None, {"terminal_weight": 0}, r"'none' has no weights, parameters or options"),
    ("none", None, {"masses": torch.ones(1)}, r"'none' has no weights, parameters or options"),
    ("min_snr", None, {"k": 1}, r"'min_snr' has no parameter 'k': it takes gamma"),
    ("debiased", None, {"gamma": 1}, r"'debiased' has no parameter 'gamma': it takes none"),
    ("debiased_kohya", None, {"gamma": 1}, r"has no parameter 'gamma': it takes none"),
    ("p2_onetrainer", None, {"k": 1}, r"has no parameter 'k': it takes gamma"),
    ("min_snr", "score", {}, r"prediction_type='score' is unknown: choose from sample"),
    ("debiased_kohya", "sample", {}, r"for epsilon and v_prediction only.*'sample': use debiased"),
    ("debiased_onetrainer", "flow", {}, r"for epsilon and v_prediction only.*'flow': use debiased"),
    ("p2_onetrainer", "epsilon", {}, r"for v_prediction only.*'epsilon': use p2"),
    ("min_snr", None, {"gamma": 0}, r"gamma=0 must be greater than 0"),
    ("min_snr", None, {"gamma": -5.0}, r"gamma=-5.0"),
    ("min_snr", None, {"gamma": True}, r"gamma=True"),
    ("min_snr_plus_one", None, {"gamma": 0}, r"gamma=0"),
    ("soft_min_snr", None, {"gamma": math.inf}, r"gamma=inf"),
    ("p2", None, {"k": -1}, r"k=-1"),
    ("p2", None, {"gamma": math.nan}, r"gamma=nan"),
    ("p2", None, {"gamma": "1"}, r"gamma='1'"),
    ("p2_onetrainer", "v_prediction", {"gamma": 0}, r"gamma=0"),
    ("edm", None, {"sigma_data": 0}, r"sigma_data=0"),
    ("sigmoid", None, {"bias": math.nan}, r"bias=nan is not a finite number"),
    ("sigmoid", None, {"bias": "0"}, r"bias='0'"),
    ("sigma_sqrt", None, {"preconditioned": 1}, r"preconditioned=1 must be true or false"),
    ("cosmap", None, {"preconditioned": "on"}, r"preconditioned='on' must be true or false"),
    ("speed", None, {"contrast": 1.5}, r"contrast=1.5 must lie in \[0, 1\]\."),
    ("speed", None, {"contrast": -0.1}, r"contrast=-0.1 must lie in \[0, 1\]\."),
    ("speed", None, {"tau": 1001}, r"tau=1001 must lie in \[0, 1000\]\."),
    ("speed", None, {"tau": True}, r"tau=True must lie in \[0, 1000\]\."),
    ("min_snr", None, {"measure": "lambda"}, r"measure='lambda' is unknown: .*draw, log_snr"),
    ("min_snr", None, {"normalise": 1}, r"normalise=1 must be true or false"),
    ("min_snr", None, {"masses": torch.ones(1000) / 1000}, r"no effect without normalise=True"),
    ("min_snr", None, {"terminal_weight": 1}, r"terminal_weight=1 has no effect.*-5.364"),
    ("min_snr", None, {"terminal_weight": -1}, r"terminal_weight=-1 must be 0 or more"),
    ("min_snr", None, {"terminal_weight": True}, r"terminal_weight=True is not a finite number"),
    ("min_snr", None, {"terminal_weight": math.inf}, r"terminal_weight=inf is not a finite number"),
]


@pytest.mark.parametrize(("name", "kind", "parameters", "message"), WRONG)
def test_wrong_names_and_numbers_are_refused(
    name: str, kind: str | None, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss_weights(name, levels_of("sd"), kind, **parameters)


@pytest.mark.parametrize(
    ("masses", "message"),
    [
        (torch.ones(999) / 999, r"shape \(1000,\), not \(999,\)"),
        ("uniform", r"shape \(1000,\), not 'uniform'"),
        (torch.ones(1000), r"sum to 1; the least is 1, the sum 1000"),
        (torch.full((1000,), 1.0001e-3), r"the sum 1.0001"),
        (torch.cat([torch.tensor([-1.0, 2.0]), torch.zeros(998)]), r"the least is -1, the sum 1"),
        (torch.full((1000,), torch.nan), r"the sum nan"),
    ],
)
def test_wrong_masses_are_refused(masses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_weights("min_snr", levels_of("sd"), normalise=True, masses=masses)


def test_speed_at_the_ends_of_its_parameters() -> None:
    levels = levels_of("sd")
    assert torch.equal(weights_of("speed", levels, "epsilon", tau=0), torch.ones(1000))
    for tau in (1, 1000):
        rising = weights_of("speed", levels, "epsilon", contrast=1, tau=tau)
        falling = weights_of("speed", levels, "epsilon", contrast=0, tau=tau)
        assert (float(rising.min()), float(rising.max())) == (0, 1)
        torch.testing.assert_close(rising + falling, torch.ones(1000))


def test_speed_needs_a_schedule_that_bends() -> None:
    with pytest.raises(ValueError, match=r"'speed' on these 2 levels: .*constant step"):
        loss_weights("speed", table([1.0, -1.0]))


@pytest.mark.parametrize("log_snr", [[0.0, 0.1, 0.3], [1.0]], ids=["noisy first", "one"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("speed", {}), ("p2", {"measure": "log_snr"}), ("p2", {"normalise": True})],
)
def test_what_needs_a_schedule_refuses_single_levels(
    name: str, options: dict[str, Any], log_snr: list[float]
) -> None:
    """A batch of levels, as a loss function sees them, has no cells, neighbours or mean."""
    at = torch.tensor(log_snr)
    levels = NoiseLevels(at, at, at, at, torch.full((len(at) + 1,), 1.0), "epsilon", "vp")
    with pytest.raises(ValueError, match=f"'{name}' .*needs a whole schedule"):
        loss_weights(name, levels, **options)
    at = torch.tensor([3.0, 2.0, 1.0])  # in order by chance, as its missing cells tell
    levels = NoiseLevels(at, at, at, at, torch.full((4,), torch.nan), "epsilon", "vp")
    with pytest.raises(ValueError, match=r"got 3 levels that are none"):
        loss_weights(name, levels, **options)
    assert loss_weights("p2", levels) is not None
    assert [WEIGHTINGS.entry(n).whole_schedule for n in ("speed", "p2")] == [True, False]


def test_log_weight_of_any_level() -> None:
    at = torch.tensor([0.0, -torch.inf, torch.inf])
    found = log_weight("min_snr", at, "v_prediction").exp()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'none' has no weights"):
        log_weight("none", at, "v_prediction")


@pytest.mark.parametrize("name", ["min_snr", "none"])
def test_a_name_is_given_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"named '{name}' exists already"):
        register(name, formula="W_x0 = 1", source="nowhere")(lambda log_snr: log_snr)
    assert "none" not in WEIGHTINGS


def test_an_own_weighting_by_name() -> None:
    @register("tilted", formula="W_x0 = S^power", source="this test", families="vp")
    def tilted(log_snr: Tensor, power: float = 1.0) -> Tensor:
        return power * log_snr

    try:
        levels = levels_of("sd")
        found = weights_of("tilted", levels, "epsilon", power=0.5)
        torch.testing.assert_close(found, weights_of("debiased", levels, "epsilon"))
        assert WEIGHTINGS.entry("tilted").families == "vp"
        assert WEIGHTINGS["tilted"] is tilted
    finally:
        WEIGHTINGS.remove("tilted")


def test_parameters_as_the_command_line_gives_them() -> None:
    from diffusers_curriculum.training.arguments.key_values import parse_key_values

    words = ["gamma=3", "measure=log_snr", "normalise=true", "terminal_weight=1"]
    given = parse_key_values("--loss_weighting_args", words)
    levels = levels_of("sd_zero_terminal")
    found = loss_weights("p2", levels, **given)  # type: ignore[arg-type]
    spelled = weights_of(
        "p2", levels, "epsilon", gamma=3.0, measure="log_snr", normalise=True, terminal_weight=1.0
    )
    assert found is not None
    assert torch.equal(found, spelled)
    folk = parse_key_values("--loss_weighting_args", ["preconditioned=TRUE"])
    assert loss_weights("cosmap", levels_of("flow"), **folk) is not None  # type: ignore[arg-type]


def test_messages_name_weightings_that_exist() -> None:
    with pytest.raises(ValueError, match="infinite") as caught:
        loss_weights("debiased", levels_of("sd_zero_terminal"), "epsilon")
    named = set(re.findall(r"\w*min_snr|sigmoid", str(caught.value)))
    assert named == {"min_snr", "soft_min_snr", "sigmoid"} <= set(WEIGHTINGS)
    for name in named:
        for schedule in SCHEDULERS:
            assert loss_weights(name, levels_of(schedule), "epsilon") is not None
