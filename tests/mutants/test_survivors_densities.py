"""What a change of one operator or number in densities/ once went unnoticed by."""

from __future__ import annotations

import pytest

from diffusers_curriculum.densities import make_density
from tests.floors_fixtures import levels_of


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_the_largest_parameter_of_beta_is_still_taken(name: str) -> None:
    edges = levels_of("sd").edges
    masses = make_density("beta", edges, **{name: 1000.0}).masses(edges)
    assert float(masses.sum()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1000\]"):
        make_density("beta", edges, **{name: 1000.1})
