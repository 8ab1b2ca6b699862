"""What each sample of each optimizer step really saw: image, caption, noise level and noise."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import train_text_to_image_curriculum as text_to_image
from diffusers_curriculum import Objective
from diffusers_curriculum.randomness import gaussian
from diffusers_curriculum.training.checkpoint.optimizer import optimizer_state
from diffusers_curriculum.training.levels import data_scale
from diffusers_curriculum.training.loop import job
from tests.scripts.small_runs import loss_of, stage_of, tensor_hash


def _nested() -> Any:
    return defaultdict(lambda: defaultdict(dict))


@dataclass
class Testimony:
    """Plain data, so that it can be written as JSON.

    Attributes:
        seen: step -> slot of the global batch -> what -> value or hash.
        losses, lrs, stages: one entry per step.
        states: one hash per step, of sampler, weights and optimizer together.
        noise: the first numbers of each noise tensor, in order.
        scale: standard deviation of the data, as the run has measured it.
    """

    seen: Any = field(default_factory=_nested)
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    scale: float | None = None


@contextmanager
def witnessed(skew: bool = False, script: ModuleType = text_to_image) -> Iterator[Testimony]:
    """Note what every sample sees.

    Args:
        skew: multiply the losses of every process but the first, and the scale that it would
            measure by itself, as if its data were harder.
    """
    told, training_step, make_update = Testimony(), script.training_step, job.make_update

    def draw(shape: Any, **kwargs: Any) -> Tensor:
        values = gaussian(shape, **kwargs)
        for slot, value in zip(kwargs["slots"], values, strict=True):
            told.seen[kwargs["step"]][slot][kwargs["purpose"]] = tensor_hash(value)
        if kwargs["purpose"] == "noise":
            told.noise += values.flatten().tolist()[:16]
        return values

    def micro_step(run: Any, step: int, slots: Any, batch: Any) -> Any:
        result = training_step(run, step, slots, batch)
        for i, slot in enumerate(slots):
            told.seen[step][slot] |= {
                "image": tensor_hash(batch["pixel_values"][i]),
                "condition": tensor_hash(_condition(batch)[i]),
                "level": _levels(result, slots.count)[i],
            }
        return result

    def update(run: Any, step: int, *rest: Any) -> Any:
        told.scale = run.levels.data_std
        told.stages.append(stage_of(run.sampler, step))
        result = make_update(run, step, *rest)
        told.losses.append(loss_of(result[0]))
        told.lrs.append(run.lr_scheduler.get_last_lr()[0])
        told.states.append(state_hash(run))
        return result

    with (
        mock.patch.object(script, "gaussian", draw, create=True),  # not all draw noise
        mock.patch.object(script, "training_step", micro_step),
        mock.patch.object(job, "make_update", update),
        mock.patch.object(Objective, "loss", _skewed if skew else Objective.loss),
        mock.patch.object(data_scale, "measure", _skewed_scale if skew else data_scale.measure),
    ):
        yield told


def _condition(batch: dict[str, Tensor]) -> Tensor:
    """Captions, classes, or nothing."""
    nothing = torch.zeros(len(batch["pixel_values"]))
    return batch.get("input_ids", batch.get("label", nothing))


def _levels(result: Any, count: int) -> list[Any]:
    """The level of each of some samples, or those of its parts."""
    levels = result.indices.reshape(count, -1)
    return levels[:, 0].tolist() if levels.shape[1] == 1 else levels.tolist()


_loss, _measure = Objective.loss, data_scale.measure


def _skewed(self: Objective, *args: Any) -> tuple[Tensor, Tensor]:
    loss, losses = _loss(self, *args)
    return loss * _factor(), losses * _factor()


def _skewed_scale(batches: Any) -> data_scale.DataScale:
    scale = _measure(batches)
    return scale._replace(std=scale.std * _factor())


def _factor() -> int:
    return 1 + 10 * int(os.environ.get("RANK", "0"))


def state_hash(run: Any) -> str:
    """SHA-256 of the states of sampler, model, average and optimizer."""
    network = run.accelerator.unwrap_model(run.network)
    ema = run.averages.ema
    held = list(run.sampler.state_dict().items()) + list(network.state_dict().items())
    held += list(optimizer_state(run.optimizer.optimizer)[0].items())
    held += list(enumerate(ema.shadow_params)) if ema else []
    digest = hashlib.sha256()
    for name, value in held:
        text = tensor_hash(value) if isinstance(value, Tensor) else repr(value)
        digest.update(f"{name}={text};".encode())
    return digest.hexdigest()


def one_thread() -> None:
    """The same number of threads everywhere, so that sums are added in the same order."""
    torch.set_num_threads(1)
