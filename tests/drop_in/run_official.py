"""Run an official training script in this process and note what it drew and what its network saw.

    python run_official.py WITNESS.json SCRIPT.py [arguments of the script]

`drawn` holds the timesteps of each draw by this library, `seen` those of each call of the
network in training.
"""

from __future__ import annotations

import functools
import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import datasets.config
import diffusers
import torch
import transformers

from diffusers_curriculum.drop_in import ForScheduler
from diffusers_curriculum.samplers import TimestepSampler

NETWORKS = (
    diffusers.UNet2DConditionModel,
    diffusers.UNet2DModel,
    diffusers.SD3Transformer2DModel,
    diffusers.FluxTransformer2DModel,
    diffusers.Flux2Transformer2DModel,
    diffusers.Lumina2Transformer2DModel,
    diffusers.QwenImageTransformer2DModel,
    diffusers.ZImageTransformer2DModel,
    diffusers.Krea2Transformer2DModel,
    diffusers.SanaTransformer2DModel,
    diffusers.HiDreamImageTransformer2DModel,
    diffusers.Ideogram4Transformer2DModel,
    diffusers.PriorTransformer,
)
CLOCKS = ("timestep", "timesteps", "t")  # what networks call that argument
NOTES: dict[str, list[list[float]]] = {"drawn": [], "seen": []}


def hide_the_stub() -> None:
    """Let libraries look for torchvision now, before the stand-in can be found.

    datasets and transformers look once and would expect far more of it than it has.
    """
    assert datasets.config.TORCHVISION_AVAILABLE in (True, False)
    if not transformers.utils.is_torchvision_available():
        sys.path.insert(0, str(Path(__file__).parent / "stubs"))


def watch_draws() -> None:
    """Note the timesteps that the sampler or the drop-in function decides on."""
    sample, density = TimestepSampler.sample, ForScheduler.compute_density_for_timestep_sampling

    @functools.wraps(sample)
    def noted_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = sample(self, *args, **kwargs)
        NOTES["drawn"].append(result.timesteps.double().tolist())
        return result

    @functools.wraps(density)
    def noted_density(self: Any, *args: Any, **kwargs: Any) -> Any:
        u = density(self, *args, **kwargs)
        known = self.levels.timesteps if self.reversed_sigmas else self.levels.timesteps.flip(0)
        NOTES["drawn"].append(known[(u * len(known)).long()].double().tolist())
        return u

    TimestepSampler.sample = noted_sample
    ForScheduler.compute_density_for_timestep_sampling = noted_density


def watch(network: Any) -> None:
    """Note the timesteps with which ``network`` is trained."""
    forward = network.forward
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            given = signature.bind(self, *args, **kwargs).arguments
            timestep = next(given[name] for name in CLOCKS if name in given)
            NOTES["seen"].append(timestep.double().tolist())
        return forward(self, *args, **kwargs)

    network.forward = noted


def main() -> None:
    witness, script, *arguments = sys.argv[1:]
    hide_the_stub()
    watch_draws()
    for network in NETWORKS:
        watch(network)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    Path(witness).write_text(json.dumps(NOTES), "utf-8")


if __name__ == "__main__":
    main()
