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
from diffusers_curriculum.training.arguments.class_conditional import parse_class_args
from diffusers_curriculum.training.arguments.unconditional import parse_unconditional_args
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.loop import guard, image_setup
from diffusers_curriculum.training.loop.monitor import Monitor
from diffusers_curriculum.training.parts import images as parts
from diffusers_curriculum.training.parts import optimizers as optimization
from tests.scripts.image_runs import CLASS_SCRIPT, UNCONDITIONAL_SCRIPT
from tests.scripts.small_runs import TINY_DIT, TINY_UNET, write_json
from tests.training.loop.test_step_never_waits import META, WARM_UP, Copies, no_numbers

SIDE, BATCH = 8, 4
EVERYTHING = "--use_ema --power_ema 0.1 --curriculum difficulty --curriculum_clusters 4"
KINDS = {
    "ddpm": "--timestep_sampler laplace --importance_correction full",
    "vlb": "--learned_variance vlb --loss_weighting min_snr",
    "flow": "--formulation flow --timestep_sampler logit_normal --loss_weighting unit_v",
    "edm": "--formulation edm --loss_weighting uncertainty",
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


def make_run(args: Any, network: Any) -> image_setup.ImageRun:
    """What a step works with, on the meta device."""
    accelerator = subject.new_accelerator(torch.device("cpu"), "no", 2)
    levels = image_setup.choose_levels(args, 0, "DDIMScheduler")
    network = network.to(META)
    averages = parts.make_averages(args, network, META)
    optimizer = optimization.build_optimizer(args, list(network.parameters()), 1)
    schedule = optimization.build_lr_scheduler(args, optimizer, 10**6)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    weights = None if levels.weights is None else levels.weights.to(META)
    null = 1000 if hasattr(args, "label_column") else None
    return image_setup.ImageRun(
        args, accelerator, 0, prepared, LatentSpace.of(None), null, levels.sampler,
        levels.objective, levels.bound, weights, levels.learned, optimizer,
        guard.FiniteGuard(accelerator, optimizer), schedule, *averages,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", [CLASS_SCRIPT, UNCONDITIONAL_SCRIPT])
def test_a_step_reads_nothing_back_and_waits_for_no_copy(
    on_meta: None, tmp_path: Any, script: str, kind: str
) -> None:
    labelled, words = script == CLASS_SCRIPT, [*KINDS[kind].split(), *EVERYTHING.split()]
    parse: Any = parse_class_args if labelled else parse_unconditional_args
    config = write_json(tmp_path / "network.json", TINY_DIT if labelled else TINY_UNET)
    flag = "--model_config" if labelled else "--model_config_name_or_path"
    args = parse([flag, str(config), "--dataset_name", "some/data", *words])
    channels = 6 if kind == "vlb" else 3
    network = build_network(
        str(config), channels=3, out_channels=channels, sample_size=SIDE,
        num_classes=10 if labelled else None,
    )  # fmt: skip
    run = make_run(args, network)
    if run.learned is not None:
        run.weights = run.learned.weights(0, META)
    monitor = Monitor(run.accelerator, run.sampler, run.weights, 100, 10, 1000, run.guard)
    plan = BatchPlan(10**4, BATCH, 2, 1, 0, 0)
    item = {"pixel_values": torch.zeros(BATCH, 3, SIDE, SIDE)}
    item |= {"label": torch.zeros(BATCH, dtype=torch.int64)} if labelled else {}
    module, batches = importlib.import_module(script), itertools.repeat(item)
    for number in range(WARM_UP):
        monitor.add(number, *module.optimizer_step(run, number, plan, batches))
    with Copies() as copies:
        monitor.add(WARM_UP, *module.optimizer_step(run, WARM_UP, plan, batches))
    once = [BATCH * 3 * SIDE * SIDE, BATCH] + ([BATCH] if labelled else [])  # images, u, labels
    assert sorted(copies.found) == sorted((n, True) for n in once for _ in range(2))
