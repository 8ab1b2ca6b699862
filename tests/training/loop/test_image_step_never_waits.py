"""The image scripts' steps on torch's meta device, which cannot be read back; see
test_step_never_waits.py."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from benchmarks.gpu import subject
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.models.networks import build_network
from diffusers_curriculum.models.two_times import with_two_times
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.loop import guard
from diffusers_curriculum.training.loop.run import make_update
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.parts.images import ImageModels
from diffusers_curriculum.training.parts.optimizers import build_lr_scheduler, build_optimizer
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.images import ImageRun, ImageTask
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from tests.scripts.image_runs import CLASS_SCRIPT, UNCONDITIONAL_SCRIPT
from tests.scripts.small_runs import TINY_DIT, TINY_UNET, write_json
from tests.training.loop.test_step_never_waits import META, WARM_UP, Copies, monitor_of, no_numbers

SIDE, BATCH = 8, 4
EVERYTHING = "--use_ema --power_ema 0.1 --curriculum difficulty --curriculum_clusters 4"
KINDS = {
    "ddpm": "--timestep_sampler laplace --importance_correction full",
    "vlb": "--learned_variance vlb --loss_weighting min_snr",
    "flow": "--formulation flow --timestep_sampler logit_normal --loss_weighting unit_v",
    "edm": "--formulation edm --loss_weighting uncertainty",
    "mean_flow": "--formulation mean_flow --interval_share 1 --loss_weighting unit_v",
}


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Accelerator, "device", property(lambda self: META))
    monkeypatch.setattr(guard, "supports_found_inf", lambda _: True)
    monkeypatch.setattr(guard.FiniteGuard, "_step_on_device", lambda _, inner, bad: inner.step())
    for name in (CLASS_SCRIPT, UNCONDITIONAL_SCRIPT):
        monkeypatch.setattr(importlib.import_module(name), "gaussian", no_numbers)
    yield
    subject.reset_accelerate()


def make_run(task: ImageTask, args: Arguments, network: Any) -> ImageRun:
    """What a step works with, on the meta device."""
    accelerator = subject.new_accelerator(torch.device("cpu"), "no", 2)
    task.choose(args, 0)
    task.levels.start(0, META)
    pixels = LatentSpace.of(None)
    task.models = ImageModels(network.to(META), pixels, pixels)
    averages = Averages(network).with_ema(args, META).with_power(args)
    optimizer = build_optimizer(args, list(network.parameters()), 1)
    schedule = build_lr_scheduler(args, optimizer, 10**6)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    job: Any = None
    return task.make_run(
        job,
        args=args,
        accelerator=accelerator,
        seed=0,
        network=prepared,
        averages=averages,
        optimizer=optimizer,
        guard=guard.FiniteGuard(accelerator, optimizer),
        lr_scheduler=schedule,
    )


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", [CLASS_SCRIPT, UNCONDITIONAL_SCRIPT])
def test_a_step_reads_nothing_back_and_waits_for_no_copy(
    on_meta: None, tmp_path: Any, script: str, kind: str
) -> None:
    if kind == "mean_flow" and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 copies the numbers in a network's code for dual numbers")
    labelled, words = script == CLASS_SCRIPT, [*KINDS[kind].split(), *EVERYTHING.split()]
    task = ClassConditional() if labelled else Unconditional()
    config = write_json(tmp_path / "network.json", TINY_DIT if labelled else TINY_UNET)
    flag = "--model_config" if labelled else "--model_config_name_or_path"
    line = [flag, str(config), "--dataset_name", "some/data", "--resolution", str(SIDE), *words]
    network = build_network(
        str(config),
        channels=3,
        out_channels=6 if kind == "vlb" else 3,
        sample_size=SIDE,
        num_classes=10 if labelled else None,
    )
    if kind == "mean_flow":
        network = with_two_times(network)
    run = make_run(task, task.parse(line), network)
    monitor = monitor_of(run)
    plan = BatchPlan(10**4, BATCH, 2, 1, 0, 0)
    item = {"pixel_values": torch.zeros(BATCH, 3, SIDE, SIDE)}
    item |= {"label": torch.zeros(BATCH, dtype=torch.int64)} if labelled else {}
    step, batches = importlib.import_module(script).training_step, itertools.repeat(item)
    for number in range(WARM_UP):
        monitor.add(number, *make_update(run, number, plan, batches, step))
    with Copies() as copies:
        monitor.add(WARM_UP, *make_update(run, WARM_UP, plan, batches, step))
    once = [BATCH * 3 * SIDE * SIDE, BATCH] + ([BATCH] if labelled else [])  # images, u, labels
    once += [BATCH] * 2 if kind == "mean_flow" else []  # second times, and where they are
    assert sorted(copies.found) == sorted((n, True) for n in once for _ in range(2))
