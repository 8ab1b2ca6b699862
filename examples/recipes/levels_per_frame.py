"""A noise level for each frame (arXiv 2407.01392): four digits that count up, a transformer."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from sklearn.datasets import load_digits
from torch import nn

from diffusers_curriculum import DensityTimestepSampler, Objective, Slots
from diffusers_curriculum.randomness import gaussian


def train(steps: int, batch: int = 32, seed: int = 0) -> list[float]:
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    scans = torch.stack([images[labels == digit][:170] for digit in range(10)]).float() / 8 - 1
    torch.manual_seed(seed)
    digits = (torch.randint(10, (512, 1)) + torch.arange(4)) % 10
    films = scans[digits, torch.randint(170, digits.shape)]  # (512, 4 frames, 64 pixels)
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.Linear(64 + 1, 128), nn.TransformerEncoder(layer, 2), nn.Linear(128, 64)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = DensityTimestepSampler(
        FlowMatchEulerDiscreteScheduler(), "logit_normal", draw="stratified", continuous=True
    )
    objective, slots, losses = Objective(sampler.levels), Slots.of(batch), []
    for step in range(steps):
        clean = films[torch.arange(step * batch, (step + 1) * batch) % len(films)]
        noise = gaussian(clean.shape[1:], seed=seed, step=step, slots=slots, purpose="noise")
        drawn = sampler.sample(slots, step=step, tokens=4)  # also arrangement="monotone", "leading"
        noisy = objective.add_noise(clean, noise, drawn.at)
        prediction = model(torch.cat([noisy, drawn.timesteps[..., None] / 1000], dim=-1))
        target = objective.target(clean, noise, drawn.at)
        loss, of_frames = objective.loss(prediction, target, per_token=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sampler.observe(drawn.indices.flatten(), of_frames.flatten(), step)
        losses.append(loss.item())
    return losses
