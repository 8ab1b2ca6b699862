"""Training with twice the output channels, from scratch: the loss, the pipeline, what it draws."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from diffusers_curriculum import Slots
from diffusers_curriculum.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from diffusers_curriculum.randomness import gaussian
from tests.scripts.image_runs import (
    CLASS_SCRIPT,
    UNCONDITIONAL_SCRIPT,
    Materials,
    drawn,
    load_pipeline,
    make_materials,
)
from tests.scripts.small_runs import finite, hashes, status, train

BATCH, SEED = 4, 3


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    torch.set_num_threads(1)
    return make_materials(tmp_path_factory.mktemp("materials"))


# -- the loss --------------------------------------------------------------------------------------


def bits_of_a_network_of_zeros(index: int, noise: np.ndarray) -> float:
    """L_t of arXiv 2102.09672, eq. 6, in bits per dimension, of predictions 0 of epsilon and v."""
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    bar = np.cumprod(1 - betas)
    beta, before, now = betas[index], bar[index - 1], bar[index]
    tilde = (1 - before) / (1 - now) * beta
    variance = math.sqrt(beta * tilde)  # v = 0 is the middle of the logarithms
    # the mean's factor of x0, and x0 - x_t / sqrt(bar) = - sqrt((1 - bar) / bar) noise
    difference = np.sqrt(before) * beta / (1 - now) * np.sqrt((1 - now) / now) * noise
    kl = 0.5 * (math.log(variance / tilde) + tilde / variance - 1 + difference**2 / variance)
    return float(kl.mean() / math.log(2))


@pytest.mark.parametrize("sampler", ["uniform", "laplace"])
@pytest.mark.parametrize("script", [CLASS_SCRIPT, UNCONDITIONAL_SCRIPT])
def test_the_first_loss_is_that_of_the_paper(
    materials: Materials, tmp_path: Path, script: str, sampler: str
) -> None:
    """A DiT starts as zero throughout; its variational term is known in closed form."""
    more = ("--max_train_steps", 1, "--learned_variance", "vlb", "--timestep_sampler", sampler)
    if sampler != "uniform":
        more += ("--importance_correction", "full")
    argv = materials.argv(tmp_path, script, "dit", "AutoencoderKL", *more)
    record = train(argv, script=script)
    (step,) = record.steps
    noise = gaussian((4, 4, 4), seed=SEED, step=0, slots=Slots(0, BATCH, BATCH), purpose="noise")
    assert min(step.indices) > 0
    importance = record.last.sampler.importance(0)[list(step.indices)].numpy()
    assert (importance == 1).all() == (sampler == "uniform")
    simple = np.square(noise.double().numpy()).mean((1, 2, 3))
    assert np.allclose(step.losses, simple, rtol=1e-5)
    pairs = zip(step.indices, noise.double().numpy(), strict=True)
    bits = np.array([bits_of_a_network_of_zeros(index, own) for index, own in pairs])
    expected = (importance * (simple + 0.001 * 1000 * bits)).mean()
    assert math.isclose(float.fromhex(step.loss), expected, rel_tol=1e-4)


def test_an_ignored_variance_has_no_loss(materials: Materials, tmp_path: Path) -> None:
    more = ("--max_train_steps", 3, "--learned_variance", "ignore")
    argv = materials.argv(tmp_path, CLASS_SCRIPT, "dit", "AutoencoderKL", *more)
    for step in train(argv, script=CLASS_SCRIPT).steps:
        assert math.isclose(float.fromhex(step.loss), np.mean(step.losses), rel_tol=1e-6)


@pytest.mark.parametrize("script", [CLASS_SCRIPT, UNCONDITIONAL_SCRIPT])
@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_only_a_variance_preserving_process_has_the_term(
    materials: Materials, tmp_path: Path, kind: str, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--max_train_steps", 1, "--formulation", kind, "--learned_variance", "vlb")
    assert status(materials.argv(tmp_path, script, "dit", "pixels", *more), script) == 2
    told = capsys.readouterr().err
    assert f"--learned_variance vlb with --formulation {kind}" in told
    assert "--learned_variance ignore" in told
    assert not (tmp_path / "model_index.json").exists()


# -- the pipeline ----------------------------------------------------------------------------------

# script, network, space, --learned_variance, more, pipeline, whether that uses the variance
KINDS = [
    (UNCONDITIONAL_SCRIPT, "unet", "pixels", "vlb", (), DDPMPipeline, True),
    (UNCONDITIONAL_SCRIPT, "unet", "pixels", "ignore", (), UnconditionalPipeline, False),
    (UNCONDITIONAL_SCRIPT, "dit", "VQModel", "vlb", (), UnconditionalPipeline, True),
    (CLASS_SCRIPT, "unet", "pixels", "vlb", (), ClassConditionalPipeline, False),
    (
        *(CLASS_SCRIPT, "dit", "AutoencoderKL", "vlb"),
        ("--sampling_scheduler", "DDPMScheduler"),
        *(ClassConditionalPipeline, True),
    ),
    (CLASS_SCRIPT, "unet", "pixels", "ignore", ("--formulation", "flow"), None, False),
    (CLASS_SCRIPT, "dit", "pixels", "ignore", ("--formulation", "edm"), None, False),
]


def network_of(pipeline: Any) -> Any:
    found = getattr(pipeline, "transformer", None)
    return pipeline.unet if found is None else found


def spread_rows(pipeline: Any) -> list[torch.Tensor]:
    """Weight and bias of the last layer, and which of their rows make the variance."""
    network = network_of(pipeline)
    layer = network.conv_out if hasattr(network, "conv_out") else network.proj_out_2
    channels = network.config["in_channels"]
    rows = torch.arange(len(layer.weight)) % (2 * channels) >= channels
    return [layer.weight.detach(), layer.bias.detach(), rows]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("script", "network", "space", "variance", "more", "kind", "uses"),
    KINDS,
    ids=["-".join([case[0].split(".")[1], *case[1:4], *case[4][1:]]) for case in KINDS],
)
def test_trains_resumes_and_draws_with_the_variance(
    materials: Materials,
    tmp_path: Path,
    script: str,
    network: str,
    space: str,
    variance: str,
    more: tuple[object, ...],
    kind: Any,
    uses: bool,
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = ("--learned_variance", variance, "--max_train_steps", 20, *more)
    argv = materials.argv(whole, script, network, space, *options, "--checkpointing_steps", 7)
    record = train(argv, script=script)
    assert finite(record)
    shutil.copytree(whole / "checkpoint-7", part / "checkpoint-7")
    argv = materials.argv(part, script, network, space, *options, "--resume_from_checkpoint", 7)
    argv[argv.index("7")] = "checkpoint-7"
    assert train(argv, script=script).steps == record.steps[7:]
    folder = "transformer" if network == "dit" else "unet"
    assert hashes(part / folder) == hashes(whole / folder) != {}

    pipeline = load_pipeline(whole)
    assert kind is None or type(pipeline) is kind
    config = network_of(pipeline).config
    assert config["out_channels"] == 2 * config["in_channels"]
    learned = pipeline.scheduler.config.get("variance_type") == "learned_range"
    assert (learned and type(pipeline.scheduler) is DDPMScheduler) == uses

    # Other variances give other images exactly where the scheduler uses them
    conditional = script == CLASS_SCRIPT
    before = drawn(pipeline, conditional)
    assert np.isfinite(before).all()
    assert before.std() > 0
    weight, bias, rows = spread_rows(pipeline)
    weight[rows] += 1.0
    bias[rows] += 1.0
    assert np.array_equal(before, drawn(pipeline, conditional)) == (not uses)
