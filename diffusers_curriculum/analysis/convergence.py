"""How fast clusters of noise levels are learned: by a network for each, and by one for all.

The first is free of interference between clusters, the second is what training does. What is
compared is the share of the fall of the loss that is still to come: the loss itself ends at a floor
that is not known, and does not rank difficulty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.analysis.probes import Denoiser, Grid, probe
from diffusers_curriculum.checks import above_zero, whole
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.randomness import Slots, batch_uniforms, gaussian, host_generator

_WINDOW = 3  # probes at the end whose mean counts as the end


@dataclass(frozen=True, eq=False)
class Curves:
    """Mean unweighted losses of clusters while they are learned.

    Attributes:
        clusters: their names, noisiest first.
        steps: (P,) optimizer steps at which they were probed, the first 0.
        losses: (P, C) float64.
    """

    clusters: tuple[str, ...]
    steps: tuple[int, ...]
    losses: Tensor

    @property
    def remaining(self) -> Tensor:
        """(P, C) share of the fall of each loss still to come: 1 at the start, about 0 at
        the end, whose loss is the mean of the last three probes; NaN where nothing fell."""
        end = self.losses[-_WINDOW:].mean(0)
        fall = self.losses[0] - end
        return (self.losses - end) / torch.where(fall > 0, fall, torch.nan)

    @property
    def area(self) -> Tensor:
        """(C,) steps below the curve of :attr:`remaining`, as a share of the run: large = slow."""
        times = torch.tensor(self.steps, dtype=torch.float64)
        part = (self.remaining[1:] + self.remaining[:-1]) / 2
        return (part * times.diff()[:, None]).sum(0) / (times[-1] - times[0])

    def steps_to(self, share: float) -> list[int | None]:
        """Of each cluster the first probed step with no more than ``share`` still to come."""
        reached = self.remaining <= share
        firsts = [column.nonzero().flatten().tolist()[:1] for column in reached.T]
        return [self.steps[first[0]] if first else None for first in firsts]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        area = [x if x == x else None for x in self.area.tolist()]
        return {
            "clusters": list(self.clusters),
            "steps": list(self.steps),
            "losses": self.losses.tolist(),
            "area": area,
            "steps_to_half": self.steps_to(0.5),
            "steps_to_a_tenth": self.steps_to(0.1),
        }


def follow(
    train_step: Callable[[int], object],
    measure: Callable[[], Sequence[float]],
    steps: int,
    every: int,
    clusters: Sequence[str],
) -> Curves:
    """Call ``train_step(step)`` for each step, and ``measure()``, one loss for each cluster, before
    the first one, after every ``every`` and after the last.

    Raises:
        ValueError: ``steps`` or ``every`` below 1.
    """
    whole("steps", steps, 1)
    whole("every", every, 1)
    at, rows = [0], [list(measure())]
    for step in range(steps):
        train_step(step)
        if (step + 1) % every == 0 or step + 1 == steps:
            at.append(step + 1)
            rows.append(list(measure()))
    return Curves(tuple(clusters), tuple(at), torch.tensor(rows, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Trial:
    """What is trained, and how: AdamW at one rate.

    Attributes:
        build: makes an untrained module that is a :data:`~probes.Denoiser`, the same each time.
        objective: of the noise levels.
        samples: (M, ...), on their device.
        held_out: how many of them, from the first on, are probed; the others are trained on.
    """

    build: Callable[[], Any]
    objective: Objective
    samples: Tensor
    held_out: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0


def convergence(
    trial: Trial,
    grid: Grid,
    starts: Sequence[int],
    steps: int,
    every: int,
    *,
    each_step: Callable[[], object] = lambda: None,
) -> dict[str, Curves]:
    """Curves of clusters that begin at the levels ``starts``, cleanest first: "one network each"
    and "one network for all", each trained for ``steps`` steps from the same weights.

    Losses are v errors (1 + S) x0 error on held-out samples, the same at every probe.

    Raises:
        ValueError: a cluster without a level of the grid, or numbers out of range.
    """
    above_zero("learning_rate", trial.learning_rate)
    whole("batch_size", trial.batch_size, 1)
    whole("held_out", trial.held_out, 2, len(trial.samples) - 1)
    parts = [_levels_of(grid, low, high) for low, high in _bounds(starts, len(grid.levels))]
    for number, part in enumerate(parts):
        if not len(part.indices):
            raise ValueError(
                f"cluster {number}, from level {starts[number]} on, has no level of the grid: give "
                "fewer clusters or more bins."
            )
    parts, bounds = parts[::-1], _bounds(starts, len(grid.levels))[::-1]
    names = [f"{float(p.edges[0]):.1f} to {float(p.edges[-1]):.1f}" for p in parts]
    alone = [
        _train(trial, bound, [part], steps, every, each_step)
        for bound, part in zip(bounds, parts, strict=True)
    ]
    joint = _train(trial, (0, len(grid.levels) - 1), parts, steps, every, each_step)
    together = torch.cat([curves.losses for curves in alone], 1)
    return {
        "one network each": Curves(tuple(names), alone[0].steps, together),
        "one network for all": Curves(tuple(names), joint.steps, joint.losses),
    }


def _bounds(starts: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(first, last) level of each cluster."""
    return list(zip(starts, [*(s - 1 for s in starts[1:]), count - 1], strict=True))


def _levels_of(grid: Grid, first: int, last: int) -> Grid:
    """The part of a grid between two levels."""
    inside = ((grid.indices >= first) & (grid.indices <= last)).nonzero().flatten()
    edges = torch.cat([inside, inside[-1:] + 1])
    return Grid(grid.levels, grid.indices[inside], grid.edges[edges])


def _train(
    trial: Trial,
    bound: tuple[int, int],
    parts: Sequence[Grid],
    steps: int,
    every: int,
    each_step: Callable[[], object],
) -> Curves:
    network = trial.build()
    optimizer = torch.optim.AdamW(network.parameters(), trial.learning_rate)

    def step(number: int) -> None:
        _step(trial, network, bound, number).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        each_step()

    def measure() -> list[float]:
        return [_loss(trial, network, part) for part in parts]

    return follow(step, measure, steps, every, [""] * len(parts))


def _step(trial: Trial, network: Denoiser, bound: tuple[int, int], step: int) -> Tensor:
    """The loss of one batch, its levels uniform between two; samples, noise and levels are
    functions of the seed and the step."""
    device, size = trial.samples.device, trial.batch_size
    draw = host_generator(trial.seed, step, purpose="trial")
    chosen = torch.from_numpy(draw.integers(trial.held_out, len(trial.samples), size)).to(device)
    clean, slots = trial.samples[chosen], Slots(0, size, size)
    noise = gaussian(
        clean.shape[1:], seed=trial.seed, step=step, slots=slots, purpose="noise", device=device
    ).to(clean.dtype)
    u = batch_uniforms("stratified", slots, seed=trial.seed, step=step)
    at = (bound[0] + (bound[1] - bound[0] + 1) * u).long().to(device)
    noisy = trial.objective.scale_input(trial.objective.add_noise(clean, noise, at), at)
    target = trial.objective.target(clean, noise, at)
    return trial.objective.loss(network(noisy, at, chosen), target)[0]


def _loss(trial: Trial, network: Denoiser, part: Grid) -> float:
    """The mean v error of a cluster on held-out samples."""
    held_out = trial.samples[: trial.held_out]
    found = probe(network, trial.objective, held_out, part, seed=trial.seed)
    return float(found.error("v").value.mean())


def starts_of(grid: Grid, clusters: int) -> list[int]:
    """First levels of ``clusters`` clusters of about equal width in log-SNR on a grid, cleanest
    first."""
    groups = grid.indices.flip(0).tensor_split(min(clusters, len(grid.indices)))
    return [0, *(int(group[0]) for group in groups[1:])]
