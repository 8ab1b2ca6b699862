"""Brief training of a small AutoencoderKL, and the scale of its latents."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import mse_loss


def train_autoencoder(
    vae: AutoencoderKL,
    images: torch.Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    batch_size: int = 32,
    learning_rate: float = 4e-3,
    kl_weight: float = 1e-4,
) -> float:
    """Train `vae` on `images` (n, 3, h, w) in [-1, 1]; return the last steps' mean squared error.

    Minimises `mean (x - decode(z))^2 + kl_weight * mean KL(q(z | x) || N(0, 1))`, both means per
    element; learning rate on one cosine arch, so that a few hundred steps are enough.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0)
    arch = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2))
    recent: list[float] = []
    vae.train()
    for _ in range(steps):
        picks = torch.randint(len(images), (batch_size,), generator=generator)
        error, divergence = _losses(vae, images[picks], generator)
        optimizer.zero_grad()
        (error + kl_weight * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        arch.step()
        recent = [*recent[-19:], float(error.detach())]
    vae.eval()
    return sum(recent) / len(recent) if recent else float("nan")


def _losses(
    vae: AutoencoderKL, batch: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reconstruction error and the KL of one batch, both as a mean per element."""
    posterior = vae.encode(batch, return_dict=False)[0]
    latents: Any = posterior.sample(generator)  # decode is annotated for a FloatTensor
    decoded = vae.decode(latents, return_dict=False)[0]
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    return mse_loss(decoded, batch), divergence


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator, batch_size: int = 128
) -> torch.Tensor:
    """Return unscaled latents (n, c, h', w'), one posterior draw per image."""
    batches = images.split(batch_size)
    posteriors = [vae.encode(batch, return_dict=False)[0] for batch in batches]
    return torch.cat([posterior.sample(generator) for posterior in posteriors])
