"""What a change of one operator or number in weighting/ once went unnoticed by."""

from __future__ import annotations

import pytest
import torch

from diffusers_curriculum.weighting import WEIGHTINGS
from tests.floors_fixtures import levels_of


@pytest.mark.parametrize(
    ("tau", "changed"), [(1, 1000), (1.0, 1000), (1.5, 2), (2, 2), (3, 3), (0.5, 500), (1000, 1000)]
)
def test_speed_takes_tau_up_to_one_as_a_fraction_and_above_as_a_number(
    tau: float, changed: int
) -> None:
    log_snr = levels_of("linear").log_snr
    on_epsilon = (WEIGHTINGS["speed"](log_snr, contrast=0.6, tau=tau) - log_snr).exp()
    one = torch.ones_like(on_epsilon)
    # contrast 0.6 keeps the others in [0.4, 0.6]
    assert torch.allclose(on_epsilon[changed:], one[changed:])
    assert bool((on_epsilon[:changed] < 0.61).all())
