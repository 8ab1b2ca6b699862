"""The loop around a training step: one update from a whole global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.randomness import Slots
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.loop.run import Outcome, Run

TrainingStep = Callable[[Any, int, Slots, dict[str, Tensor]], Outcome]


def make_update(
    run: Run,
    step: int,
    plan: BatchPlan,
    batches: Iterator[dict[str, Tensor]],
    training_step: TrainingStep,
) -> tuple[Any, Tensor | None]:
    """Optimizer step ``step``, from its micro-batches to what is learned from their losses.

    Returns:
        The outcomes of all processes' micro-batches as one, and the norm of the gradient.
    """
    accelerator, observed, norm = run.accelerator, [], None
    for micro in range(plan.accumulation):
        with accelerator.accumulate(run.network):
            observed.append(training_step(run, step, plan.slots(micro), next(batches)))
            if accelerator.sync_gradients:
                parameters = run.network.parameters()
                norm = accelerator.clip_grad_norm_(parameters, run.args.max_grad_norm)
                run.update(step, observed, norm)
            run.optimizer.zero_grad()
    run.lr_scheduler.step()
    run.averages.update(step)

    # Observe: once per update, the same numbers on every process
    columns = (torch.cat(column) for column in zip(*observed, strict=True))
    outcome = type(observed[0])(*(accelerator.gather(column) for column in columns))
    run.observe(step, outcome)
    return outcome, norm
