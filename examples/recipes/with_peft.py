"""LoRA by peft on a class-conditional transformer, with timesteps from a curriculum."""

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits

from diffusers_curriculum import CurriculumTimestepSampler, Objective


def train(steps: int, batch: int = 32, prepare=lambda model: lambda timesteps: None) -> list[float]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    sizes = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "norm_num_groups": 1}
    model = DiTTransformer2DModel(2, 16, num_layers=2, num_embeds_ada_norm=10, **sizes)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "proj"]))
    tell = prepare(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    sampler = CurriculumTimestepSampler.from_scheduler(
        DDPMScheduler(), clusters=4, pacing="fixed", pacing_args={"stage_steps": steps // 8 + 1}
    )
    objective, losses = Objective(sampler.levels), []
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(images)
        clean, noise = images[rows], torch.randn(batch, 1, 8, 8)
        timesteps, levels, *_ = sampler.sample(batch, step=step)
        tell(timesteps)
        prediction = model(objective.add_noise(clean, noise, levels), timesteps, labels[rows])[0]
        loss, _ = objective.loss(prediction, objective.target(clean, noise, levels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train(steps=60)
    print(f"first ten steps {sum(losses[:10]) / 10:.3f}, last ten {sum(losses[-10:]) / 10:.3f}")
