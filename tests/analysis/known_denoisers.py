"""Data whose best denoiser is known, as a network of each prediction type would tell it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_curriculum.analysis.mixtures import Mixture
from diffusers_curriculum.analysis.probes import Denoiser
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.randomness import host_generator
from tests.floors_fixtures import levels_of

MODELS = ("sample", "epsilon", "v_prediction", "flow", "edm")


def two_dimensional() -> Mixture:
    """Three round clouds of unequal weight."""
    means = torch.tensor([[-1.0, 0.4], [0.5, 1.0], [0.8, -0.9]])
    weights = torch.tensor([0.2, 0.5, 0.3])
    return Mixture(weights.double(), means.double(), torch.tensor([0.02, 0.05, 0.01]).double())


def drawn(mixture: Mixture, count: int, seed: int = 0) -> Tensor:
    """(count, D) samples of a mixture, float64."""
    draw = host_generator(seed, count, purpose="test samples")
    chosen = torch.from_numpy(draw.choice(len(mixture.weights), count, p=mixture.weights.numpy()))
    noise = torch.from_numpy(draw.standard_normal((count, mixture.dimension)))
    return mixture.means[chosen] + mixture.variances[chosen].sqrt()[:, None] * noise


def objective_of(kind: str, schedule: str = "linear") -> Objective:
    """Of a prediction type, on its own family of schedules."""
    name = kind if kind in ("flow", "edm") else schedule
    levels = levels_of(name, prediction_type="epsilon") if name == "edm" else levels_of(name)
    return Objective(levels if kind in ("flow", "edm") else levels.with_prediction_type(kind))


def best(mixture: Mixture, objective: Objective, shift: float = 0.0) -> Denoiser:
    """The network that knows the mixture; ``shift`` is added to its estimates of x0."""
    levels = objective.levels

    def denoise(given: Tensor, at: Tensor, where: Tensor) -> Tensor:
        alpha, sigma = levels.alpha[at], levels.sigma[at]
        ones = torch.ones(len(at), 1, dtype=given.dtype)
        noisy = given / objective.scale_input(ones, at)
        x0 = mixture.denoised(noisy, alpha, sigma) + shift
        noise = (noisy - alpha[:, None] * x0) / sigma[:, None]
        return objective.target(x0, noise, at)

    return denoise
