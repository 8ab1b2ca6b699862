"""Tasks of pictures: learn a data set from scratch, or classes that a trained network lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.evidence.cells import VERSION, digest
from benchmarks.evidence.data import Pictures, pictures
from benchmarks.evidence.judge import distances, judge_of, keep, spread
from benchmarks.evidence.large import SeveralNetworks
from benchmarks.evidence.network import SeededNetwork, StackedMlp
from benchmarks.evidence.sampling import generate, generators
from benchmarks.evidence.target import Target
from benchmarks.evidence.training import Trainer, Values

UNIFORM = {"sampler": {"density": "uniform"}}


class ImageTask:
    """A data set, by classes or captions.

    Attributes:
        quality: the measure that decides, lower is better.
    """

    quality = "frechet"

    def __init__(
        self, config: Mapping[str, Any], settings: Mapping[str, Any], cache_dir: Path
    ) -> None:
        self.config, self.settings, self.cache_dir = config, settings, cache_dir
        self.everything = pictures(config["data"])
        self.classes: list[int] = config.get("classes") or [*range(self.everything.classes)]
        self.pictures = self.everything.of(self.classes)
        self.size = self.everything.rows.shape[1]

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures drawn with replacement, and their classes."""
        rows = torch.randint(len(self.pictures.rows), (count,), generator=generator)
        return self.pictures.rows[rows], self.pictures.labels[rows]

    def new_network(self, seeds: Sequence[int]) -> Any:
        told: dict[str, Any] = {"classes": self.everything.classes, "words": self.everything.words}
        if "network" in self.config:
            return SeveralNetworks(seeds, size=self.size, name=self.config["network"], **told)
        told |= {name: self.settings[name] for name in ("width", "blocks")}
        return StackedMlp(seeds, size=self.size, **told)

    def start(self, seeds: Sequence[int], target: Target, told: Mapping[str, Any]) -> SeededNetwork:
        """The network that training starts from; ``told`` is the target's config."""
        return self.new_network(seeds)

    def probe(self, count: int) -> tuple[Tensor, Tensor]:
        """The pictures on which losses by noise level are measured."""
        return self.batch(count, torch.Generator().manual_seed(0))

    def measure(
        self, network: SeededNetwork, seeds: Sequence[int], target: Target, last: bool
    ) -> dict[str, Any]:
        """Distances of samples, for each seed: with the first number of sampling steps and the
        first guidance, and at the last checkpoint with each of the others too."""
        (steps, *other_steps), (guidance, *others) = (
            self.settings[name] for name in ("sampling_steps", "guidance")
        )
        found = self._sampled(network, seeds, target, steps=steps, guidance=guidance)
        if not last:
            return {"metrics": found}
        for other in others:
            told = self._sampled(network, seeds, target, steps=steps, guidance=other)
            found |= {f"{name}, guidance {other:g}": value for name, value in told.items()}
        for other in other_steps:
            told = self._sampled(network, seeds, target, steps=other, guidance=guidance)
            found |= {f"{name}, {other} sampling steps": value for name, value in told.items()}
        return {"metrics": found}

    def _sampled(
        self,
        network: SeededNetwork,
        seeds: Sequence[int],
        target: Target,
        *,
        steps: int,
        guidance: float,
        of: Pictures | None = None,
        fewer: int = 1,
    ) -> Values:
        real, count = of or self.pictures, max(self.settings["samples"] // fewer, 2)
        labels = asked(real, count)
        rows = [torch.randn(count, self.size, generator=g) for g in generators(seeds, "samples")]
        noise = torch.stack(rows).to(network.device)
        told = labels.to(network.device)
        made = generate(network, target, noise, told, steps=steps, guidance=guidance).cpu()
        judge = judge_of(self.config["data"], self.cache_dir)
        return by_name(distances(judge, real, each, labels) for each in made)


class FineTuningTask(ImageTask):
    """The classes of ``classes``, by a network that was trained on those of ``before`` alone, with
    uniform draws; all weights, or adapters of rank ``rank`` and the classes' vectors."""

    def start(self, seeds: Sequence[int], target: Target, told: Mapping[str, Any]) -> SeededNetwork:
        settings = {**self.settings, "steps": self.config["steps_before"]}
        names = ("steps", "batch", "learning_rate", "average", "class_dropout", "width", "blocks")
        base = {"data": self.config["data"], "classes": self.config["before"]}
        key = [VERSION, base, told, [*seeds], {name: settings[name] for name in names}]
        file = self.cache_dir / f"base-{digest(key)}.safetensors"
        network = self.new_network(seeds)
        if not file.is_file():
            task = ImageTask(base, settings, self.cache_dir)
            trainer = Trainer(network, seeds, task, target, UNIFORM, settings)
            for step in range(settings["steps"]):
                trainer.step(step)
            with trainer.averaged():
                keep(file, {name: p.detach().clone() for name, p in network.named_parameters()})
        state = load_file(file)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(state[name])
        if self.config.get("rank"):
            network.adapt(self.config["rank"], seeds)
        return network

    def measure(
        self, network: SeededNetwork, seeds: Sequence[int], target: Target, last: bool
    ) -> dict[str, Any]:
        """Those of the new classes, and the Frechet distance of the old ones as ``forgetting``."""
        found = super().measure(network, seeds, target, last)
        before = self.everything.of(self.config["before"])
        steps, guidance = self.settings["sampling_steps"][0], self.settings["guidance"][0]
        old = self._sampled(
            network, seeds, target, steps=steps, guidance=guidance, of=before, fewer=2
        )
        found["metrics"]["forgetting"] = old["frechet"]
        return found


def asked(real: Pictures, count: int) -> Tensor:
    """The classes of ``count`` samples: each class as often as any other, captions as often as they
    are found among the pictures."""
    found = real.labels[spread(len(real.labels), count)]
    labels = real.labels.unique() if real.words is None else found
    return labels[torch.arange(count) % len(labels)]


def by_name(rows: Any) -> Values:
    """A list for each name of mappings that have the same names."""
    rows = [*rows]
    return {name: [row[name] for row in rows] for name in rows[0]}
