"""What a change of one operator or number in drop_in/ once went unnoticed by."""

from __future__ import annotations

import pytest
import torch

from diffusers_curriculum import drop_in


@pytest.mark.parametrize("shape", [(0,), (0, 1, 1, 1), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr", "weighting:sigma_sqrt"])
def test_weights_of_none_and_of_one_sample(name: str, shape: tuple[int, ...]) -> None:
    sigmas = torch.full(shape, 0.5)
    weights = drop_in.compute_loss_weighting_for_sd3(name, sigmas)
    assert weights.shape == shape
    four = drop_in.compute_loss_weighting_for_sd3(name, torch.full((4,), 0.5))
    assert torch.equal(weights.flatten(), four[: sigmas.numel()])
