"""The catalogue as a whole: what is told, what is refused, and a law of one's own."""

from __future__ import annotations

import math
import re
import textwrap
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler, densities
from diffusers_curriculum.densities import DENSITIES, make_density, portable_parameters
from diffusers_curriculum.densities.base import largest
from diffusers_curriculum.noise_levels import NoiseLevels
from tests.floors_fixtures import SCHEDULERS

EDGES = torch.linspace(8.0, -6.0, 11, dtype=torch.float64)


def _t(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_every_entry_tells_formula_source_and_families(name: str) -> None:
    entry = DENSITIES.entry(name)
    assert (entry.name, entry.make) == (name, DENSITIES[name])
    assert len(entry.formula) > 5
    assert len(entry.source) > 10
    assert entry.families in {"all", "vp", "flow", "edm"}
    for text in (entry.formula, entry.source, entry.note):
        assert text.isascii()
        assert "|" not in text.replace("|l - mu|", "")  # it stands in a table


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_the_repr_of_a_law_is_one_readable_line(name: str) -> None:
    edges = NoiseLevels.from_scheduler(SCHEDULERS["sd"]()).edges
    law = make_density(name, edges, **DENSITIES.entry(name).example)
    assert "tensor" not in repr(law)
    assert repr(law).startswith(type(law).__name__)


@pytest.fixture
def _forgotten_afterwards() -> Any:
    before = set(DENSITIES)
    yield
    for name in set(DENSITIES) - before:
        DENSITIES.remove(name)


@pytest.mark.usefixtures("_forgotten_afterwards")
def test_the_law_in_five_lines_of_the_docstring_works() -> None:
    text = re.search(r"::\n\n(    @register.*?)\n\n", densities.__doc__ or "", re.DOTALL)
    assert text is not None
    code = textwrap.dedent(text.group(1))
    assert len(code.splitlines()) - 2 <= 5
    names = vars(densities) | {"torch": torch, "dataclass": __import__("dataclasses").dataclass}
    exec(compile(code, "docstring", "exec", dont_inherit=True), dict(names))
    oracle: Any = stats.gumbel_r(0, 1.5)
    law = make_density("gumbel", EDGES, b=1.5)
    x = torch.linspace(-5, 12, 171, dtype=torch.float64)
    torch.testing.assert_close(law.pdf(x), _t(oracle.pdf(x)), atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(law.cdf(x), _t(oracle.cdf(x)), atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(law.sf(x), _t(oracle.sf(x)), atol=1e-15, rtol=0)
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    torch.testing.assert_close(law.icdf(p), _t(oracle.ppf(p)), atol=1e-11, rtol=0)
    assert law.icdf(_t([0.0, 1.0])).tolist() == [-math.inf, math.inf]
    assert DENSITIES.entry("gumbel").formula.startswith("F(l)")
    with pytest.raises(ValueError, match="b=0 must be greater than 0"):
        make_density("gumbel", EDGES, b=0)
    sampler = DensityTimestepSampler(SCHEDULERS["sd"](), "gumbel", {"b": 1.5})
    assert float(sampler.probabilities().sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("logistic", {"s": 0}, r"s=0 must be greater than 0"),
        ("split_normal", {"std_clean": -1.0}, r"std_clean=-1\.0 must be greater than 0"),
        ("split_normal", {"mu": None}, r"mu=None is not a finite number"),
        ("log_snr_uniform", {"low": 3, "high": 3}, r"low=3 must be below high=3: swap them"),
        ("log_snr_uniform", {"high": math.inf}, r"high=inf is not a finite number"),
        ("logit_normal", {"std": 0.0}, r"std=0\.0 must be greater than 0"),
        ("logit_normal", {"shift": 0}, r"shift=0 must be greater than 0"),
        ("logit_normal", {"shift": "3"}, r"shift='3' is not a finite number"),
        ("logit_normal", {"tokens": -5}, r"tokens=-5 must be greater than 0"),
        ("flow_uniform", {"shift": 3.0, "tokens": 256}, r"shift=3\.0 and tokens=256 each say what"),
        (
            "cosmap",
            {"tokens": 256, "pixels": 9, "base_pixels": 4},
            r"tokens=256 and pixels=9 each say",
        ),
        ("mode", {"pixels": 1024}, r"pixels=1024 and base_pixels=None go together"),
        ("mode", {"base_pixels": 1024}, r"pixels=None and base_pixels=1024 go together"),
        ("mode", {"shift": 2, "base_pixels": 1024}, r"go together"),
        ("mode", {"scale": 1.76}, r"scale=1\.76 is out of range: use -1 <= scale <= .* 1\.7519"),
        ("heavy_tail", {"scale": -1.01}, r"scale=-1\.01 is out of range"),
        ("edm", {"p_std": 0}, r"p_std=0 must be greater than 0"),
        ("edm", {"mu": 0}, r"'edm' has no parameter 'mu': it takes p_mean, p_std"),
        ("edm", {"p_mean": 10**400}, r"is not a finite number"),
        ("u_shaped", {"a": 0}, r"a=0 must lie in \(0, 500\]"),
        ("u_shaped", {"a": 501.0}, r"a=501\.0 must lie in \(0, 500\]"),
        ("beta", {"alpha": 0}, r"alpha=0 must lie in \(0, 1000\]"),
        ("beta", {"beta": 1001}, r"beta=1001 must lie in \(0, 1000\]"),
        ("speed", {"tau": 1}, r"tau=1 must be a fraction below 1, or a number of timesteps"),
        ("speed", {"tau": 10}, r"tau=10 .* below the schedule's 10"),
        ("speed", {"tau": 0}, r"tau=0 must be greater than 0"),
        ("speed", {"k": 0}, r"k=0 must be greater than 0"),
        ("timestep_bias", {"strategy": "none"}, r"strategy='none' is unknown: choose from earlier"),
        ("timestep_bias", {"strategy": ["later"]}, r"strategy=\['later'\] is unknown"),
        ("timestep_bias", {"multiplier": 0}, r"multiplier=0 must be greater than 0"),
        ("timestep_bias", {"portion": 0.09}, r"chooses none of the 10 timesteps.* portion of 0\.1"),
        ("timestep_bias", {"portion": 1.5}, r"portion=1\.5 must lie in \(0, 1\]"),
        ("timestep_bias", {"portion": 0}, r"portion=0 must lie in \(0, 1\]"),
        ("timestep_bias", {"begin": 3}, r"begin=3 has no effect with strategy='later'"),
        (
            "timestep_bias",
            {"strategy": "range", "portion": 0.5},
            r"portion=0\.5 has no effect with strategy='range'",
        ),
        ("timestep_bias", {"strategy": "range", "end": 11}, r"do not exist: \[0, 11\)"),
        (
            "timestep_bias",
            {"strategy": "range", "begin": 5, "end": 5},
            r"chooses none of the 10 timesteps.*\[5, 5\)",
        ),
        ("timestep_bias", {"strategy": "range", "begin": -1}, r"begin=-1 must be a whole number"),
        ("timestep_bias", {"strategy": "range", "end": 2.5}, r"end=2\.5 must be a whole number"),
        ("grid", {}, r"'grid' needs 'timesteps', for example"),
        ("grid", {"timesteps": []}, r"timesteps=\[\] names none"),
        ("grid", {"timesteps": "9"}, r"timesteps='9' names none"),
        ("grid", {"timesteps": [10]}, r"timesteps\[0\]=10 must be a whole number from 0 to 9"),
        ("grid", {"timesteps": [1, 2.0]}, r"timesteps\[1\]=2\.0 must be a whole number"),
        ("grid", {"timesteps": [1, 1]}, r"has one twice"),
        ("grid", {"timesteps": [1], "weights": [1, 2]}, r"weights=\[1, 2\] for 1 timesteps"),
        ("grid", {"timesteps": [1, 2], "weights": "12"}, r"weights='12' for 2 timesteps"),
        ("grid", {"timesteps": [1, 2], "weights": [1, 0]}, r"weights\[1\]=0 must be greater"),
        ("beta", {"edges": 1}, r"'beta' has no parameter 'edges'"),
        (["laplace"], {}, r"\['laplace'\] is unknown"),
    ],
)
def test_what_is_refused(name: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_density(name, EDGES, **parameters)


def test_portable_parameters_are_plain_copies() -> None:
    points = [(0, 1), (1, 2.5)]
    plain = portable_parameters("spline", {"points": points})
    assert plain == {"points": [[0, 1], [1, 2.5]]}
    assert portable_parameters("laplace", {"b": 0.1}) == {"b": 0.1}
    with pytest.raises(ValueError, match=r"'spline' must be numbers, words.*tolist\(\)"):
        portable_parameters("spline", {"points": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="'splin' is unknown"):
        portable_parameters("splin", {})


# -- bisection -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [-1e300, -3.7, -1e-310, 0.0, 5e-324, 1e-200, 1.0, math.pi, 1.7e308]
)
def test_bisection_finds_the_very_number(wanted: float) -> None:
    low, high = _t([-math.inf]), _t([math.inf])
    assert largest(lambda x: x <= wanted, low, high).tolist() == [wanted]
    below = math.nextafter(wanted, -math.inf)
    assert largest(lambda x: x < wanted, low, high).tolist() == [below]


def test_bisection_at_its_ends() -> None:
    low, high = _t([-math.inf, 0.0, 2.0]), _t([math.inf, 1.0, 2.0])
    always = largest(lambda x: torch.ones_like(x, dtype=torch.bool), low, high)
    assert always.tolist() == [math.inf, 1.0, 2.0]
    never = largest(lambda x: torch.zeros_like(x, dtype=torch.bool), low, high)
    assert never.tolist() == [-math.inf, 0.0, 2.0]
    mixed = largest(lambda x: x <= _t([0.25, 0.25, 3.0]), low, high)
    assert mixed.tolist() == [0.25, 0.25, 2.0]
