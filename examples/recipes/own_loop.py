"""A whole loop in plain torch: digits, a small U-Net, Laplace sampling in a curriculum."""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

from diffusers_curriculum import CurriculumTimestepSampler, Objective, Slots, loss_weights
from diffusers_curriculum.randomness import gaussian


def train(steps: int, batch: int = 32, seed: int = 0) -> list[float]:
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    torch.manual_seed(seed)
    model = UNet2DModel(8, 1, 1, block_out_channels=(32, 32), norm_num_groups=8, **blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    curriculum = {"clusters": 5, "pacing": "linear", "pacing_args": {"total_steps": steps // 2}}
    sampler = CurriculumTimestepSampler.from_scheduler(
        DDPMScheduler(), {"density": "laplace", "seed": seed}, **curriculum
    )
    objective, weights = Objective(sampler.levels), loss_weights("min_snr", sampler.levels)
    slots, losses = Slots.of(batch), []
    for step in range(steps):
        clean = images[torch.arange(step * batch, (step + 1) * batch) % len(images)]
        noise = gaussian(clean.shape[1:], seed=seed, step=step, slots=slots, purpose="noise")
        timesteps, levels, *_ = sampler.sample(slots, step=step)
        prediction = model(objective.add_noise(clean, noise, levels), timesteps).sample
        target = objective.target(clean, noise, levels)
        loss, loss_per_sample = objective.loss(prediction, target, weights[levels])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sampler.observe(levels, loss_per_sample, step)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train(steps=100)
    print(f"first ten steps {sum(losses[:10]) / 10:.3f}, last ten {sum(losses[-10:]) / 10:.3f}")
