"""A job of your own: a network that learns points of a two-dimensional mixture, with every law of
noise levels, every curriculum, exact resume and the rest that a job brings.

    python examples/recipes/own_job.py --output_dir points --timestep_sampler laplace
"""

from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusers_curriculum import Slots
from diffusers_curriculum.randomness import gaussian, host_generator, key
from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
from diffusers_curriculum.training.arguments.flag import COUNT, Family, tracked
from diffusers_curriculum.training.arguments.noise_levels import PREDICTION
from diffusers_curriculum.training.arguments.run import FAMILIES
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.job import Job, run_script
from diffusers_curriculum.training.loop.run import LevelLosses, LevelRun
from diffusers_curriculum.training.loop.task import Trained
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.tasks.levels import LevelTask

POINTS = tracked("points", int, 1000, "points to learn", bound=COUNT, most=10**7, setting="dataset")


class Network(ModelMixin, ConfigMixin):
    """Noise in a point (B, 2) at timesteps (B,)."""

    @register_to_config
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = (nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, points: Tensor, timesteps: Tensor) -> Tensor:
        return self.layers(torch.cat([points, timesteps[:, None] / 500 - 1], 1))


class Points(Dataset):
    def __init__(self, rows: Tensor, plan: Any) -> None:
        self.rows, self.plan = rows, plan

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {"points": self.rows[self.plan.index(position)]}


class Mixture(LevelTask):
    """What a job asks: flags, noise levels, data, network, and what its step works with."""

    families = (Family.of("data", POINTS), *FAMILIES, PREDICTION, *NOISE_LEVELS)
    command_line = CommandLine("Learn the points of a mixture.", families)

    def choose_levels(self, args: Any, seed: int) -> Levels:
        return Levels.of(args, DDPMScheduler(), DDPMScheduler(), seed)

    def load_rows(self, args: Any, seed: int) -> Tensor:
        draw = host_generator(0, purpose="points")
        centres = draw.choice([-1.0, 1.0], (args.points, 2))
        return torch.from_numpy(centres + 0.1 * draw.standard_normal((args.points, 2))).float()

    def load(self, job: Any) -> Trained:
        torch.manual_seed(key(job.seed, purpose="network") >> 65)
        network = Network().to(job.accelerator.device)
        averages = Averages(network).with_ema(job.args, job.accelerator.device)
        return Trained(network, "network", averages)

    def make_run(self, job: Any, **common: Any) -> LevelRun:
        return LevelRun(**common, levels=self.levels)

    def dataset(self, job: Any) -> Points:
        return Points(job.rows, job.plan)


def training_step(run: LevelRun, step: int, slots: Slots, batch: dict[str, Tensor]) -> LevelLosses:
    """One micro-batch, from points to gradients."""
    device = run.accelerator.device
    points = batch["points"].to(device)
    draw = partial(gaussian, seed=run.seed, step=step, slots=slots, device=device)
    noise, drawn = draw((2,), purpose="noise"), run.sampler.sample(slots, step=step, device=device)
    noisy = run.objective.add_noise(points, noise, drawn.at)
    prediction = run.network(noisy, drawn.timesteps)
    target = run.objective.target(points, noise, drawn.at)
    loss, losses = run.objective.loss(prediction, target, run.loss_weights(drawn))
    run.accelerator.backward(loss)
    return LevelLosses(drawn.indices, losses, loss.detach().reshape(1))


if __name__ == "__main__":
    run_script(lambda: Job(Mixture()).train(training_step))
