"""Curves through points: scipy's spline, straight lines, files, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.densities import Density, make_density, portable_parameters
from tests.densities.oracles import POINTS, SplineLaw, TableLaw
from tests.floors_fixtures import SCHEDULERS

EDGES = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)


def _t(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _law(name: str, **args: Any) -> Density:
    return make_density(name, EDGES, **args)


LISTS = [
    POINTS,
    [[0, 1], [2, 1]],
    [[0, 0], [2, 3]],
    [[-3, 0], [0, 5], [0.1, 5], [4, 0]],
    [[-8, 2], [-7, 0], [5, 0], [6, 1]],
    [[-1, 0.001], [0, 1000], [1, 0.001]],
    [[-5, 3], [-1, 2.9], [0, 0.1], [9, 0.05], [10, 0]],
]


@pytest.mark.parametrize("points", LISTS)
def test_spline_is_that_of_scipy(points: list[list[float]]) -> None:
    law, oracle = _law("spline", points=points), SplineLaw(points)
    x = torch.linspace(-9, 11, 2001, dtype=torch.float64)
    torch.testing.assert_close(law.pdf(x), _t(oracle.pdf(x.numpy())), atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(law.cdf(x), _t(oracle.cdf(x.numpy())), atol=1e-13, rtol=0)
    torch.testing.assert_close(law.sf(x), _t(oracle.sf(x.numpy())), atol=1e-13, rtol=0)


@pytest.mark.parametrize("points", LISTS)
def test_table_is_straight_lines(points: list[list[float]]) -> None:
    log_snr, density = zip(*points, strict=True)
    law, oracle = _law("tabulated", log_snr=log_snr, density=density), TableLaw(log_snr, density)
    x = torch.linspace(-9, 11, 501, dtype=torch.float64)
    torch.testing.assert_close(law.pdf(x), _t(oracle.pdf(x.numpy())), atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(law.cdf(x), _t(oracle.cdf(x.numpy())), atol=1e-14, rtol=0)


@pytest.mark.parametrize("points", LISTS)
def test_quantiles_of_curves(points: list[list[float]]) -> None:
    for law in (
        _law("spline", points=points),
        _law("tabulated", log_snr=[p[0] for p in points], density=[p[1] for p in points]),
    ):
        u = torch.linspace(0, 1, 101, dtype=torch.float64)
        torch.testing.assert_close(law.cdf(law.icdf(u)), u, atol=1e-12, rtol=0)
        ends = [min(p[0] for p in points), max(p[0] for p in points)]
        assert law.icdf(_t([0.0, 1.0])).tolist() == ends


@given(
    st.lists(
        st.tuples(st.integers(-80, 80), st.one_of(st.just(0.0), st.floats(1e-6, 1e6))),
        min_size=2,
        max_size=8,
        unique_by=lambda pair: pair[0],
    )
)
def test_a_spline_is_nowhere_negative_and_adds_up_to_one(pairs: list[tuple[int, float]]) -> None:
    if not any(density for _, density in pairs):
        return
    points = [[x / 10, density] for x, density in pairs]
    law = _law("spline", points=points)
    x = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    density, cdf = law.pdf(x), law.cdf(x)
    assert bool((density >= 0).all())
    assert bool((cdf.diff() >= -1e-15).all())
    assert float(cdf[-1]) == 1.0
    knots = sorted(p[0] for p in points)
    area = sum(quad(lambda v: float(law.pdf(_t(v))), a, b)[0] for a, b in pairwise(knots))
    assert area == pytest.approx(1, abs=1e-6)


def test_an_ordinary_cubic_spline_would_go_negative_here() -> None:
    from scipy.interpolate import CubicSpline

    points = [[-5, 0], [-4, 0], [0, 5], [4, 0], [5, 0]]
    x = np.linspace(-5, 5, 500)
    assert CubicSpline(*np.array(points, float).T)(x).min() < -0.1
    assert float(_law("spline", points=points).pdf(_t(x)).min()) >= 0


def test_tails_of_a_table_keep_their_digits() -> None:
    law = _law("tabulated", log_snr=[-1.0, 0.0, 1.0], density=[0.0, 1.0, 0.0])
    for step in (2.0**-20, 2.0**-40):  # the triangle's tail is step^2 / 2
        x = _t([1 - step])
        torch.testing.assert_close(law.sf(x), _t([step**2 / 2]), atol=0, rtol=1e-12)
        torch.testing.assert_close(law.cdf(-x), _t([step**2 / 2]), atol=0, rtol=1e-12)


def test_order_and_scale_do_not_matter() -> None:
    x = torch.linspace(-7, 8, 301, dtype=torch.float64)
    ours = _law("spline", points=POINTS).cdf(x)
    shuffled = [POINTS[i] for i in (3, 0, 4, 2, 1)]
    assert torch.equal(_law("spline", points=shuffled).cdf(x), ours)
    scaled = [[a, 1e6 * b] for a, b in POINTS]
    torch.testing.assert_close(_law("spline", points=scaled).cdf(x), ours, atol=1e-14, rtol=0)


# -- files -----------------------------------------------------------------------------------------

ROWS = [(-4.0, 0.1), (0.0, 1.0), (1.5, 0.9), (5.0, 0.2)]
TEXTS = {
    "plain": "\n".join(f"{a},{b}" for a, b in ROWS),
    "header": "log_snr,density\n" + "\n".join(f"{a},{b}" for a, b in ROWS) + "\n",
    "other order, other columns": "step, Density , log_snr\n"
    + "\n".join(f"7,{b},{a}" for a, b in ROWS),
    "byte order mark, blank lines": "\ufefflog_snr,density\n\n"
    + "\n\n".join(f"{a}, {b}" for a, b in ROWS),
    "descending": "\n".join(f"{a},{b}" for a, b in reversed(ROWS)),
    "windows": "\r\n".join(f'"{a}",{b:e}' for a, b in ROWS),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_csv_file_is_a_table(text: str, tmp_path: Path) -> None:
    path = tmp_path / "density.csv"
    path.write_bytes(text.encode())
    x = torch.linspace(-5, 6, 111, dtype=torch.float64)
    log_snr, density = zip(*ROWS, strict=True)
    expected = _law("tabulated", log_snr=log_snr, density=density)
    assert torch.equal(_law("tabulated", path=str(path)).cdf(x), expected.cdf(x))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"d\.csv' holds no numbers: write two columns"),
        ("\n\n", r"holds no numbers"),
        ("log_snr,density\n", r"0 points make no density"),
        ("1,2\n", r"1 points make no density: give two or more"),
        ("l,p\n1,2\n", r"d\.csv line 1: the header 'l,p' has no column 'log_snr'"),
        ("log_snr,mass\n1,2\n", r"line 1: .* has no column 'density'"),
        ("1,2\n3\n", r"d\.csv line 2: '3' has 1 columns"),
        ("1,2\n3,4,5\n", r"line 2: '3,4,5' has 3 columns"),
        ("log_snr,x,density\n1,2,3\n4,5\n", r"line 3: '4,5' has 2 columns"),
        ("1,2\n\n3,four\n", r"d\.csv line 3: 'four' is not a finite number"),
        ("1,2\n3,nan\n", r"line 2: 'nan' is not a finite number"),
        ("1,2\ninf,3\n", r"line 2: 'inf' is not a finite number"),
        ("1,2\n3,-0.5\n", r"line 2: the density -0\.5 is negative"),
        ("1,2\n1,3\n", r"log-SNR 1\.0 is given twice"),
        ("1,0\n2,0\n", r"the densities of all points .* add up to 0\.0"),
    ],
)
def test_files_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        _law("tabulated", path=str(path))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv' cannot be read as a CSV file"):
        _law("tabulated", path=str(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"binary\.csv' cannot be read"):
        _law("tabulated", path=str(tmp_path / "binary.csv"))
    with pytest.raises(ValueError, match="cannot be read"):
        _law("tabulated", path=str(tmp_path))


def test_portable_parameters_need_no_file(tmp_path: Path) -> None:
    path = tmp_path / "density.csv"
    path.write_text(TEXTS["header"], "utf-8")
    plain = portable_parameters("tabulated", {"path": str(path)})
    assert plain == {"log_snr": [a for a, _ in ROWS], "density": [b for _, b in ROWS]}
    nested = portable_parameters(
        "mixture",
        {
            "components": [
                {"density": "laplace", "b": 1.0},
                {
                    "density": "truncated",
                    "weight": 2,
                    "density_args": {
                        "density": "tabulated",
                        "low": 0.5,
                        "density_args": {"path": str(path)},
                    },
                },
            ]
        },
    )
    before = DensityTimestepSampler(SCHEDULERS["sd"](), "mixture", nested)
    path.unlink()
    before.save_pretrained(str(tmp_path))
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.probabilities(), before.probabilities())
    assert "path" not in str(nested)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, r"'spline' needs 'points', for example \{\"points\": \[\[-6\.0"),
        ({"points": 3}, r"points=3 is not a list"),
        ({"points": "abc"}, r"points='abc' is not a list"),
        ({"points": []}, r"0 points make no density"),
        ({"points": [[0, 1]]}, r"1 points make no density: give two or more"),
        ({"points": [[0, 1], 2]}, r"points\[1\]=2 is not a list of numbers"),
        ({"points": [[0, 1], [1, 2, 3]]}, r"points\[1\]=\[1\.0, 2\.0, 3\.0\] is not a pair"),
        ({"points": [[0, 1], [1, "2"]]}, r"points\[1\]\[1\]='2' is not a finite number"),
        ({"points": [[0, 1], [math.inf, 2]]}, r"points\[1\]\[0\]=inf is not a finite number"),
        ({"points": [[0, 1], [1, -2]]}, r"density -2\.0 at log-SNR 1\.0 is negative"),
        ({"points": [[0, 1], [0, 2]]}, r"log-SNR 0\.0 is given twice"),
        ({"points": [[0, 0], [1, 0]]}, r"add up to 0\.0: give one or more"),
        ({"points": [[0, 1e308], [100, 1e308]]}, r"add up to inf"),
        ({"points": torch.tensor([[0.0, 1.0], [1.0, 2.0]])}, r"pass \.tolist\(\)"),
    ],
)
def test_points_that_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _law("spline", **args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, r"a table needs log_snr and density, two lists of numbers, or path"),
        ({"log_snr": [0, 1]}, r"a table needs log_snr and density"),
        ({"density": [0, 1]}, r"a table needs log_snr and density"),
        ({"log_snr": [0, 1], "density": [1, 1], "path": "x"}, r"give the one or the other"),
        ({"log_snr": [0, 1], "path": "x"}, r"give the one or the other"),
        ({"path": 3}, r"path=3 is not the name of a file"),
        ({"log_snr": [0, 1], "density": [1, 2, 3]}, r"log_snr has 2 numbers and density 3"),
        ({"log_snr": [0, 1], "density": "ab"}, r"density='ab' is not a list of numbers"),
        ({"log_snr": [0, None], "density": [1, 2]}, r"log_snr\[1\]=None is not a finite number"),
        ({"log_snr": [0, 1], "density": [1, -1]}, r"density -1\.0 at log-SNR 1\.0 is negative"),
        ({"log_snr": [1, 1], "density": [1, 1]}, r"log-SNR 1\.0 is given twice"),
        ({"log_snr": [0, 1], "density": [0, 0]}, r"add up to 0\.0"),
    ],
)
def test_tables_that_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _law("tabulated", **args)


def test_points_off_the_schedule_have_no_mass_there() -> None:
    with pytest.raises(ValueError, match="has no mass on this schedule"):
        DensityTimestepSampler(SCHEDULERS["sd"](), "spline", {"points": [[50, 1], [60, 1]]})
