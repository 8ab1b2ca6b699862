"""What a change of one operator or number in samplers/ once went unnoticed by."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.samplers import SAMPLERS
from tests.floors_fixtures import SCHEDULERS, levels_of


class Uniform(TimestepSampler):
    """Draws every level alike."""

    def law(self, step: int, device: torch.device) -> Tensor:
        return torch.full((len(self.levels),), 1 / len(self.levels), dtype=torch.float64)


def test_the_seed_of_a_sampler_is_zero_unless_it_is_told() -> None:
    levels = levels_of("sd")
    drawn = Uniform(levels).sample(50).indices
    assert torch.equal(drawn, Uniform(levels, seed=0).sample(50).indices)
    assert not torch.equal(drawn, Uniform(levels, seed=1).sample(50).indices)


@pytest.mark.parametrize(("name", "steps"), [("gradient_norm", 1000)])
def test_the_warm_up_that_is_documented(name: str, steps: int) -> None:
    assert inspect.signature(SAMPLERS[name]).parameters["warm_up"].default == steps


@pytest.mark.parametrize(("deviations", "warns"), [(3.2, False), (3.4, True)])
def test_the_warning_is_of_the_outer_thousandth_half_of_it_on_each_side(
    deviations: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    levels = levels_of("sd")
    noisiest = float(levels.log_snr[levels.finite][-1])
    with caplog.at_level(logging.WARNING):
        # 0.05 % of a normal law lie beyond 3.29 standard deviations, 0.025 % beyond 3.48
        DensityTimestepSampler(
            SCHEDULERS["sd"](),
            density="normal",
            density_args={"mean": noisiest + 2.0 * deviations, "std": 2.0},
            floor=0.0,
        )
    assert ("floor of 0.1" in caplog.text) == warns
