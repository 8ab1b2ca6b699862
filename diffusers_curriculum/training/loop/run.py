"""What a training step works with, and the loop around one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusers_curriculum.objective import Objective
from diffusers_curriculum.randomness import Slots, key
from diffusers_curriculum.samplers import TimestepSample, TimestepSampler
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.process.sharding import whole_tensor
from diffusers_curriculum.weighting.variational import VariationalBound

# Standard normal numbers of a shape for each sample of a batch: draw(shape, purpose="noise").
Draw = Callable[..., Tensor]


class Outcome(Protocol):
    """What a step returns of its micro-batch: a NamedTuple of tensors, samples on the first axis.

    Attributes:
        loss: (1,) what was differentiated.
        losses: (N, ...) of what it is the mean.
    """

    @property
    def loss(self) -> Tensor: ...

    @property
    def losses(self) -> Tensor: ...


class LevelLosses(NamedTuple):
    """The outcome of a micro-batch of noise levels."""

    indices: Tensor  # (B,) levels
    losses: Tensor  # (B,) unweighted loss of each sample
    loss: Tensor  # (1,) what was differentiated


@dataclass(kw_only=True)
class Run:
    """What a step works with; a kind of job adds its models."""

    args: Arguments
    accelerator: Any  # accelerate.Accelerator, whose gather() is typed too widely
    seed: int
    network: Any  # trained, prepared by accelerate
    averages: Averages  # of its weights
    optimizer: Any
    guard: FiniteGuard
    lr_scheduler: Any

    @property
    def weights(self) -> Any:
        """What is trained, averaged and saved: the network without accelerate's wrappers, or an
        adapter in it."""
        return self.averages.network

    def seed_model(self, step: int, slots: Slots) -> None:
        """Set the global generators of the host and of this process's device, from which a model
        with dropout draws, for a micro-batch. ``torch.manual_seed`` gives the same numbers, but
        takes half a millisecond, as it asks every kind of device that there might be."""
        number = key(self.seed, step, slots.start, purpose="model") >> 65
        torch.default_generator.manual_seed(number)
        device = self.accelerator.device
        if device.type not in ("cpu", "meta"):  # the second holds no numbers
            torch.get_device_module(device).manual_seed(number)

    def update(self, step: int, observed: Sequence[Outcome], norm: Tensor | None) -> None:
        """Update the weights from gradients that are complete, unless they are not finite.

        Args:
            observed: outcomes of this process's micro-batches.
            norm: of the gradient, before clipping.
        """
        self.guard.step((part for seen in observed for part in (seen.losses, seen.loss)), norm)

    def observe(self, step: int, outcome: Any) -> None:
        """Learn from an update: called once for each, with the outcomes of all processes. Nothing
        may be learned from one that was left out, as ``guard.left_out`` tells on the device."""


@dataclass(kw_only=True)
class LevelRun(Run):
    """What a step on noise levels works with."""

    levels: Levels

    @property
    def sampler(self) -> TimestepSampler:
        """Draws the levels."""
        return self.levels.sampler

    @property
    def objective(self) -> Objective:
        """Adds noise, and says what is predicted."""
        return self.levels.objective

    @property
    def bound(self) -> VariationalBound | None:
        """The variational term of a learned variance; None where none is trained."""
        return self.levels.bound

    def input_levels(self, at: Tensor, draw: Draw) -> Tensor:
        """The levels whose noise is added: ``at``, or slower ones under --mixflow_gamma."""
        gamma = self.args.mixflow_gamma
        if gamma is None:
            return at
        return self.objective.slowed(at, gamma * torch.special.ndtr(draw((), purpose="mixflow")))

    def loss_weights(self, drawn: TimestepSample) -> Tensor | None:
        """(B,) weights of the samples' losses, importance included; None where all are 1."""
        return self.levels.loss_weights(drawn)

    def observe(self, step: int, outcome: LevelLosses) -> None:
        # a loss that is not finite is no observation
        losses = outcome.losses.masked_fill(self.guard.left_out, torch.nan)
        self.levels.observe(outcome.indices, losses, step)


TrainingStep = Callable[[Any, int, Slots, dict[str, Tensor]], Outcome]


def make_update(
    run: Run,
    step: int,
    plan: BatchPlan,
    batches: Iterator[dict[str, Tensor]],
    training_step: TrainingStep,
) -> tuple[Any, Tensor | None]:
    """Optimizer step ``step``, from its micro-batches to what is learned from their losses.

    The learning rate and the averages are functions of the step, as the data and the draws are:
    they go on where an update was left out, and its unchanged weights are averaged once more.

    Returns:
        The outcomes of all processes' micro-batches as one, and the norm of the gradient.
    """
    accelerator, observed, norm = run.accelerator, [], None
    for micro in range(plan.accumulation):
        with accelerator.accumulate(run.network):
            observed.append(training_step(run, step, plan.slots(micro), next(batches)))
            if accelerator.sync_gradients:
                parameters = run.averages.parameters
                norm = accelerator.clip_grad_norm_(parameters, run.args.max_grad_norm)
                norm = whole_tensor(norm)
                run.update(step, observed, norm)
            run.optimizer.zero_grad()
    run.lr_scheduler.step()
    run.averages.update(step)

    # Observe: once per update, the same numbers on every process
    columns = (torch.cat(column) for column in zip(*observed, strict=True))
    outcome = type(observed[0])(*(accelerator.gather(column) for column in columns))
    run.observe(step, outcome)
    return outcome, norm
