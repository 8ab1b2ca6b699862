"""Levels per frame go into a video transformer of diffusers (Wan), as it takes them."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.objective import Objective

FRAMES, SIDE, PATCHES = 3, 4, 4  # patches of a frame


def test_each_frame_of_a_film_has_its_level() -> None:
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2,
        out_channels=2,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=8,
    )
    sampler = DensityTimestepSampler(FlowMatchEulerDiscreteScheduler(), "logit_normal", floor=0.0)
    objective, text = Objective(sampler.levels), torch.randn(2, 5, 8)
    clean, noise = torch.randn(2, 2, FRAMES, 2, SIDE, SIDE)  # frames are tokens: (B, N, C, H, W)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Films as Wan has them, and the level of each of its patches."""
        told = timesteps.repeat_interleave(PATCHES, dim=1)
        film = network(noisy.transpose(1, 2), told, text, return_dict=False)[0]
        return film.transpose(1, 2)

    drawn = sampler.sample(2, tokens=FRAMES, arrangement="monotone", step=0)
    noisy = objective.add_noise(clean, noise, drawn.at)
    target = objective.target(clean, noise, drawn.at)
    prediction = predict(noisy, drawn.timesteps)
    loss, losses = objective.loss(prediction, target, per_token=True)
    assert losses.shape == (2, FRAMES)
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())

    with torch.no_grad():
        # one level for all frames is what the network is told otherwise
        same = drawn.timesteps[:, :1].expand(-1, FRAMES)
        film = network(noisy.transpose(1, 2), same[:, 0], text, return_dict=False)[0]
        assert torch.allclose(predict(noisy, same), film.transpose(1, 2), atol=1e-5)
        # and a frame's own level tells
        changed = predict(noisy, drawn.timesteps - torch.tensor([0.0, 0.0, 300.0]))
        assert not torch.allclose(changed[:, 2], prediction[:, 2], atol=1e-3)
