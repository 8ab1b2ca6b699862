"""Networks of two times: they begin as those of one, and are saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

from diffusers_curriculum.average_velocity import forward_derivative
from diffusers_curriculum.models.networks import load_network
from diffusers_curriculum.models.two_times import TWO_TIMES, with_two_times

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "num_class_embeds": 4,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 2,
    "sample_size": 8,
    "in_channels": 3,
    "num_embeds_ada_norm": 3,
}
NETWORKS: dict[Any, dict[str, Any]] = {UNet2DModel: UNET, DiTTransformer2DModel: DIT}
TOLD = torch.tensor([[900.0, 500.0], [400.0, 0.0]])


def output(network: Any, timesteps: torch.Tensor) -> torch.Tensor:
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        return network(image, timesteps, class_labels=labels, return_dict=False)[0]


@pytest.fixture(params=NETWORKS, ids=lambda kind: kind.__name__)
def single(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param(**NETWORKS[request.param]).eval()


def test_it_goes_on_from_one_time_and_learns_the_other(single: Any, tmp_path: Path) -> None:
    double = with_two_times(single).eval()
    assert type(double) is TWO_TIMES[type(single)]
    assert with_two_times(double) is double
    expected = output(single, TOLD[0])
    assert torch.allclose(output(double, TOLD), expected, atol=1e-6)
    assert torch.equal(output(double, TOLD[0]), output(double, TOLD * torch.tensor([[1.0], [0]])))

    # once it has learned, the length tells
    for name, weight in double.named_parameters():
        if ".length." in name:
            torch.nn.init.normal_(weight, std=0.5)
    lengths = output(double, TOLD)
    alone = output(double, TOLD[0])
    assert not torch.allclose(lengths[0], alone[0], atol=1e-3)
    assert torch.allclose(lengths[1], alone[1], atol=1e-6)

    double.save_pretrained(tmp_path)
    again = load_network(str(tmp_path)).eval()
    assert type(again) is type(double)
    assert torch.equal(output(again, TOLD), lengths)


def test_it_has_a_forward_derivative(single: Any) -> None:
    """Which is that of differences, as far as sines in float32 tell."""
    double = with_two_times(single).eval().double()
    for name, weight in double.named_parameters():
        if ".length." in name:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(1))
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    labels, told, step = torch.tensor([0, 1]), TOLD.double(), 0.03

    def called(z: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return double(z, times, class_labels=labels, return_dict=False)[0]

    direction = (image.cos(), torch.ones_like(told))
    rate = forward_derivative(called, (image, told), direction)
    with torch.no_grad():
        ahead, behind = (called(image + h * image.cos(), told + h) for h in (step, -step))
    slope = (ahead - behind) / (2 * step)
    assert (rate - slope).abs().max() < 1e-2 * slope.abs().max()


def test_times_that_are_looked_up_have_no_second_one() -> None:
    network = UNet2DModel(**UNET, time_embedding_type="fourier")
    with pytest.raises(ValueError, match="time_embedding_type='fourier'"):
        with_two_times(network)
