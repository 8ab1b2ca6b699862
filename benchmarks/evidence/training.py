"""Training of a cell: all its seeds in one network, each with its own sampler, data and noise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.evidence.network import SeededNetwork, parameters_of
from benchmarks.evidence.sampling import generators, normal
from benchmarks.evidence.target import Target
from diffusers_curriculum import Slots

Values = dict[str, list[float]]  # a measure of each seed, by name


class Task(Protocol):
    """What is learned.

    Attributes:
        quality: name of the measure that decides, lower is better.
    """

    quality: str

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """(count, size) samples and their classes (count,), if there are any."""
        ...

    def start(self, seeds: Sequence[int], target: Target, told: Mapping[str, Any]) -> SeededNetwork:
        """The network that training starts from; ``told`` is the target's config."""
        ...

    def probe(self, count: int) -> tuple[Tensor, Tensor | None]:
        """As :meth:`batch`, always the same ones."""
        ...

    def measure(
        self, network: SeededNetwork, seeds: Sequence[int], target: Target, last: bool
    ) -> dict[str, Any]:
        """What a checkpoint tells of a network: measures of each seed as ``metrics``, more of them
        at the last one, and what else the task knows."""
        ...


class Clock:
    """Seconds that were spent in something: of a processor, which are those of the wall on a
    machine that does nothing else, as a process has one thread; with a GPU, of the wall, until the
    GPU has done it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds += self._now() - start

    def _now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Trainer:
    """One optimizer step after the other, of all seeds.

    Args:
        network: with its start weights, on the device to train on; what is frozen stays so.
        seeds: one for each row of it.
        method: content of a method's file.
        settings: as of a cell.

    Attributes:
        done: steps so far.
        total: seconds of all steps.
        overhead: of those, seconds that the law took: drawing and observing.
    """

    def __init__(
        self,
        network: SeededNetwork,
        seeds: Sequence[int],
        task: Task,
        target: Target,
        method: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        self.network, self.task, self.target, self.settings = network, task, target, settings
        steps, self.device = settings["steps"], network.device
        self.samplers = [target.sampler(method["sampler"], seed, steps) for seed in seeds]
        weights = target.weights(method, steps)
        self.weights = None if weights is None else weights.to(self.device)
        self.parameters = parameters_of(network)
        self.optimizer = torch.optim.AdamW(
            self.parameters, settings["learning_rate"], weight_decay=0.0, fused=True
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.data = generators(seeds, "data")
        self.noise = generators(seeds, "noise", self.device)
        self.total, self.overhead, self.done = Clock(self.device), Clock(self.device), 0

    def step(self, number: int) -> Tensor:
        """(S, B) the unweighted losses of optimizer step ``number``, counted from 0."""
        with self.total.running():
            losses, indices = self._update(number)
            with self.overhead.running():
                for row, sampler in enumerate(self.samplers):
                    sampler.observe(indices[row], losses[row], number)
            self._update_average(number)
        self.done = number + 1
        return losses

    def _update(self, number: int) -> tuple[Tensor, Tensor]:
        count, objective = self.settings["batch"], self.target.objective
        clean, labels = self._batch(count)
        noise = torch.stack([normal(clean.shape[1:], g) for g in self.noise])
        with self.overhead.running():
            slots = Slots(0, count, count)
            drawn = [s.sample(slots, step=number, device=self.device) for s in self.samplers]
        at, indices = torch.cat([d.at for d in drawn]), torch.stack([d.indices for d in drawn])
        flat, seeds = clean.flatten(0, 1), len(self.samplers)
        noisy = objective.add_noise(flat, noise.flatten(0, 1), at)
        given = objective.scale_input(noisy, at).view_as(clean)
        log_snr = at if at.is_floating_point() else self.target.levels.to(self.device).log_snr[at]
        prediction = self.network(given, log_snr.view(seeds, count), labels)
        weights = torch.cat([d.importance for d in drawn])
        if self.weights is not None:
            weights = weights * self.weights[indices.flatten()]
        wanted = objective.target(flat, noise.flatten(0, 1), at)
        loss, losses = objective.loss(prediction.flatten(0, 1), wanted, weights)
        (loss * seeds).backward()  # the mean over each seed's own batch
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.view(seeds, count), indices

    def _batch(self, count: int) -> tuple[Tensor, Tensor | None]:
        parts = [self.task.batch(count, generator) for generator in self.data]
        clean = torch.stack([rows for rows, _ in parts]).to(self.device)
        if not self.network.nothing:
            return clean, None
        labels = torch.stack([classes for _, classes in parts if classes is not None])
        dropped = torch.stack([torch.rand(count, generator=g) for g in self.data])
        dropped = dropped < self.settings["class_dropout"]
        return clean, labels.masked_fill(dropped, self.network.nothing).to(self.device)

    def _update_average(self, number: int) -> None:
        """The decay of diffusers' EMAModel: it rises as (1 + n) / (10 + n) up to its bound."""
        decay = min(self.settings["average"], (1 + number) / (10 + number))
        with torch.no_grad():
            for average, present in zip(self.average, self.parameters, strict=True):
                average.lerp_(present, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[SeededNetwork]:
        """The network with the averaged weights, for a while."""
        kept = [p.detach().clone() for p in self.parameters]
        self._take(self.average)
        try:
            yield self.network
        finally:
            self._take(kept)

    def _take(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)
