"""A network that knows the average velocity goes from noise to data in any number of steps."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusers_curriculum.pipelines.denoising import denoise

STD = 0.3  # of data that are normal: the path through x at t is x times a ratio of deviations


def average(x: Tensor, timesteps: Tensor, progress: float) -> Tensor:
    t, length = (timesteps / 1000).view(2, -1, 1, 1, 1)
    deviation = [((1 - at).square() * STD**2 + at.square()).sqrt() for at in (t, t - length)]
    return x * (1 - deviation[1] / deviation[0]) / length


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_number_of_steps_ends_in_the_same_data(steps: int, shift: float) -> None:
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    data = denoise(average, scheduler, noise, steps, two_times=True)
    assert torch.allclose(data, STD * noise, atol=1e-5)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_steps_that_are_not_straight_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} does not go straight"):
        denoise(average, kind(), torch.zeros(1, 1, 2, 2), 1, two_times=True)
