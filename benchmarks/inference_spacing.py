"""When does an inference schedule that follows the law help? Denoisers that are known exactly.

    python -m benchmarks.inference_spacing

Data: a mixture of three normal laws in one dimension, whose denoiser is a formula. DDIM and the
fitted schedules then map quantiles of pure noise to samples without any drawing, and the distance
W1 to the data is a mean over quantiles. The second denoiser says nothing, v = 0, at levels that a
Laplace law without a floor hardly ever trains: an extreme picture of a network that never saw them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import diffusers
import torch
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler, NoiseLevels
from diffusers_curriculum.inference_spacing import HARDLY_TRAINED, fit_inference

WEIGHTS, MEANS, STDS = (torch.tensor(v) for v in ([0.2, 0.5, 0.3], [-1.6, 0.1, 1.3], [0.2] * 3))
QUANTILES = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
STEPS = (10, 25, 50)
Denoiser = Callable[[Tensor, int], Tensor]


def schedulers() -> tuple[diffusers.DDPMScheduler, diffusers.DDIMScheduler]:
    """The training schedule, cosine and v prediction, and DDIM on it."""
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    ddim = diffusers.DDIMScheduler(**settings, clip_sample=False, timestep_spacing="trailing")  # type: ignore[call-arg]
    return diffusers.DDPMScheduler(**settings), ddim  # type: ignore[call-arg]


def exact(levels: NoiseLevels) -> Denoiser:
    """v of the posterior mean of x0 given x = a x0 + b noise."""

    def velocity(x: Tensor, level: int) -> Tensor:
        a, b = float(levels.alpha[level]), float(levels.sigma[level])
        spread = (a * STDS).square() + b * b
        log = WEIGHTS.log() - spread.log() / 2 - (x[:, None] - a * MEANS).square() / (2 * spread)
        means = MEANS + a * STDS.square() / spread * (x[:, None] - a * MEANS)
        x0 = (log.softmax(1) * means).sum(1)
        return (a * x - x0) / b

    return velocity


def where_trained(denoiser: Denoiser, mass: Tensor) -> Denoiser:
    """The same, but 0 at levels that are hardly trained."""
    trained = mass * len(mass) >= HARDLY_TRAINED
    return lambda x, level: denoiser(x, level) if trained[level] else torch.zeros_like(x)


def distance(scheduler: diffusers.DDIMScheduler, levels: NoiseLevels, denoiser: Denoiser) -> float:
    """W1 between the data and what ``scheduler``, its timesteps set, makes of pure noise."""
    x = torch.special.ndtri(QUANTILES)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, int(t)), int(t), x, return_dict=False)[0].double()
    return float((x.sort().values - data_quantiles()).abs().mean())


def data_quantiles() -> Tensor:
    """By bisection of the distribution function."""
    low, high = torch.full_like(QUANTILES, -9.0), torch.full_like(QUANTILES, 9.0)
    for _ in range(60):
        middle = (low + high) / 2
        cdf = (WEIGHTS * torch.special.ndtr((middle[:, None] - MEANS) / STDS)).sum(1)
        low, high = (
            torch.where(cdf < QUANTILES, middle, low),
            torch.where(cdf < QUANTILES, high, middle),
        )
    return low


def table() -> list[tuple[str, int, float, float, float]]:
    """(denoiser, steps, W1 of DDIM, of the fit with cover=0.5, and with cover=0)."""
    training, ddim = schedulers()
    rows = []
    for name, floor in (("exact", 0.1), ("exact where trained", 0.0)):
        sampler = DensityTimestepSampler(training, "laplace", floor=floor)
        levels, denoiser = sampler.levels, exact(sampler.levels)
        if not floor:
            denoiser = where_trained(denoiser, sampler.probabilities())
        for steps in STEPS:
            ddim.set_timesteps(steps)
            fits = (fit_inference(ddim, sampler, steps, cover=cover) for cover in (0.5, 0.0))
            results = [
                distance(each, levels, denoiser) for each in (ddim, *(f.scheduler for f in fits))
            ]
            rows.append((name, steps, *results))
    return rows


def main() -> None:
    """Print the table in the form in which the docs have it."""
    lines = ["| denoiser | steps | DDIM | fit, cover=0.5 | fit, cover=0 |", "|---|---|---|---|---|"]
    for name, steps, *results in table():
        lines.append(f"| {name} | {steps} | " + " | ".join(f"{r:.4f}" for r in results) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
