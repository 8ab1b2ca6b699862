"""No number that a flag is given ends in an error of a library, without memory, or after minutes:
it is taken, or refused at once."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import resource
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.models.tiny import MINUSCULE, make_tiny_pipeline
from diffusers_curriculum.samplers import SequenceTimestepSampler, learning_samplers, sampler_named
from diffusers_curriculum.training.arguments.flag import Flag
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.optimizers import (
    build_lr_scheduler,
    build_optimizer,
    check_rates,
)
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.flow import FlowTransformer
from diffusers_curriculum.training.tasks.image_tokens import ImageTokens
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora
from diffusers_curriculum.training.tasks.text_to_image_lora_sdxl import TextToImageLoraSDXL
from diffusers_curriculum.training.tasks.text_to_image_sdxl import TextToImageSDXL
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from diffusers_curriculum.weighting import WEIGHTINGS
from diffusers_curriculum.weighting.learned import LearnedLossWeights

ROOT = Path(__file__).parents[3]
WHOLE = ("-1", "0", str(10**9), str(10**12), str(2**63), str(10**400), "nan", "1e308")
REAL = ("-1", "0", "1e-300", "1e9", "1e308", "inf", "nan", str(10**400))
PARAMETERS = ("-1", "0", "1", "1e-300", str(10**9), str(2**63), "-1e308", "1e308")
MEMORY, SECONDS = 2**30, 1.0  # more than a command line may take, and for how long
BASES = {
    "text_to_image": ["--pretrained_model_name_or_path", "{pipeline}", "--resolution", "8"],
    "class_conditional": ["--model_config", "DiT-S/2", "--resolution", "8"],
    "unconditional": ["--resolution", "32"],
    "vit_vqgan": ["--resolution", "32"],
    "own_job": [],
}
CURRICULUM = ["--curriculum", "difficulty", "--curriculum_max_share", "inf"]
# One of them holds for each flag that needs others, the first being enough for most.
CONTEXTS: tuple[list[str], ...] = (
    [],
    CURRICULUM,
    [*CURRICULUM, "--curriculum_clustering", "log_snr"],
    [*CURRICULUM, "--curriculum_clustering", "explicit", "--curriculum_boundaries", "0", "9"],
    [*CURRICULUM, "--curriculum_pacing", "fixed", "--curriculum_stage_steps", "9"],
    [*CURRICULUM, "--curriculum_pacing", "cosine", "--curriculum_total_steps", "9"],
    ["--formulation", "flow"],
    ["--formulation", "edm"],
    ["--formulation", "mean_flow"],
    ["--use_ema"],
    ["--power_ema", "0.1"],
    ["--lr_scheduler", "cosine_with_restarts"],
    ["--lr_scheduler", "polynomial"],
    ["--bad_samples", "skip"],
    ["--streaming"],
    ["--timestep_sampler", "laplace"],
    ["--timestep_shift_preset", "flux", "--timestep_shift_tokens", "64"],
    ["--timestep_bias_strategy", "earlier"],
    ["--timestep_bias_strategy", "range"],
    ["--dream_training"],
    ["--validation_prompts", "x"],
    ["--validation_data_dir", "x"],
    ["--perceptual_model", "x"],
    ["--cache_latents"],
    ["--cache_text_embeddings"],
    ["--pretrained_vae_model_name_or_path", "{vae}", "--cache_latents"],
    ["--eval_metrics", "fid", "--eval_steps", "9"],
    ["--optimizer", "prodigy"],
    ["--mask_from_alpha"],
    ["--instance_prompt=a", "--with_prior_preservation", "--class_prompt=b", "--class_data_dir=c"],
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("odd") / "pipeline"
    make_tiny_pipeline(None, folder, resolution=8, vae_steps=0, sizes=MINUSCULE)
    return {"{pipeline}": str(folder), "{vae}": str(folder / "vae")}


def task_of(name: str, patch: pytest.MonkeyPatch) -> Any:
    patch.syspath_prepend(str(ROOT / "examples" / "autoencoder"))
    patch.syspath_prepend(str(ROOT / "examples" / "recipes"))
    own = {
        "text_to_image": TextToImage,
        "text_to_image_lora": TextToImageLora,
        "text_to_image_sdxl": TextToImageSDXL,
        "text_to_image_lora_sdxl": TextToImageLoraSDXL,
        "flow": FlowTransformer,
        "class_conditional": ClassConditional,
        "unconditional": Unconditional,
        "image_tokens": ImageTokens,
    }
    foreign = {"vit_vqgan": ("vqgan_task", "VQGAN"), "own_job": ("own_job", "Mixture")}
    if name in own:
        return own[name]
    module, kind = foreign[name]
    return getattr(import_module(module), kind)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let what allocates more than ``MEMORY`` fail."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def chosen(task: Any, line: list[str]) -> None:
    """What a command line comes to before data and models are looked at."""
    one = task()
    with contextlib.redirect_stderr(io.StringIO()):
        args = one.parse(line, machine=False)
    one.choose(args, 0)
    steps = args.max_train_steps
    check_rates(args, 1, steps)
    optimizer = build_optimizer(args, [torch.nn.Parameter(torch.ones(1))], 1)
    build_lr_scheduler(args, optimizer, steps)
    if "resolution" in vars(args):
        ImageTransform.of(args)


def fault(task: Any, line: list[str]) -> str | None:
    """What is wrong with how a command line is taken or refused."""
    told, seconds = f"{' '.join(line[-4:])[:200]}: ", 0.0
    for _ in range(2):  # a collection of garbage, which comes to any line, does not come twice
        start = time.process_time()
        try:
            chosen(task, line)
        except (UsageError, SystemExit):
            pass
        except Exception as error:
            return f"{told}{error!r}"[:400]
        seconds = time.process_time() - start
        if seconds <= SECONDS:
            return None
    return f"{told}{seconds:.1f} s"


def numeric(task: Any) -> list[Flag]:
    flags = task.command_line.flags
    return [f for f in flags if f.type not in (None, str) and f.name != "timestep_draw"]


def with_needs(task: Any, base: list[str], flag: Flag, places: dict[str, str]) -> list[str]:
    """A command line on which a flag has an effect."""
    for context in CONTEXTS:
        line = [places.get(word, word) for word in [*base, *context]]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                args = task().parse(line, machine=False)
        except (UsageError, SystemExit):
            continue
        if all(need.holds(args) for need in flag.needs):
            return line
    raise AssertionError(f"--{flag.name} needs {[need.told for need in flag.needs]}")


@pytest.mark.reliability
@pytest.mark.parametrize("name", BASES)
def test_a_number_is_taken_or_refused_at_once(
    name: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, base = task_of(name, monkeypatch), [*BASES[name], "--max_train_steps", "100"]
    lines = []
    for flag in numeric(task):
        line = with_needs(task, base, flag, places)
        values = WHOLE if flag.type is int else REAL
        lines += [[*line, f"--{flag.name}", value] for value in values]
    assert len(lines) > 200
    with little_memory():
        faults = [told for line in lines if (told := fault(task, line))]
    assert not faults, "\n".join(faults)


def parameters(of: Any) -> list[str]:
    """Names of the numbers that a law takes."""
    numbers = inspect.signature(of).parameters.values()
    return [
        each.name
        for each in numbers
        if {"int", "float"} & set(re.findall(r"\w+", str(each.annotation)))
    ]


def laws() -> Iterator[tuple[str, str, dict[str, Any], list[str]]]:
    """Flag, name, needed parameters and numeric parameters of all that command lines can name."""
    for name in DENSITIES:
        yield "timestep_sampler", name, DENSITIES.entry(name).example, parameters(DENSITIES[name])
    for name in learning_samplers():
        yield "timestep_sampler", name, {}, parameters(sampler_named(name))
    two_phase = parameters(SequenceTimestepSampler.two_phase)
    yield "timestep_sampler", "two_phase", {"switch_step": 9}, [*two_phase, "mix_steps"]
    for name in WEIGHTINGS:
        own = parameters(WEIGHTINGS.entry(name).make)
        yield "loss_weighting", name, WEIGHTINGS.entry(name).example, [*own, "terminal_weight"]
    yield "loss_weighting", "uncertainty", {}, parameters(LearnedLossWeights)


@pytest.mark.reliability
def test_a_parameter_is_taken_or_refused_at_once(places: dict[str, str]) -> None:
    base = [places.get(word, word) for word in BASES["text_to_image"]]
    lines = []
    for flag, name, needed, names in laws():
        for parameter in names:
            others = {key: value for key, value in needed.items() if key != parameter}
            words = [f"{key}={json.dumps(value)}" for key, value in others.items()]
            for value in PARAMETERS:
                own = [*words, f"{parameter}={value}"]
                line = [f"--{flag}", name, f"--{flag}_args", *own]
                lines.append([*base, "--max_train_steps", "100", *line])
    assert len(lines) > 800
    with little_memory():
        faults = [told for line in lines if (told := fault(TextToImage, line))]
    assert not faults, "\n".join(faults)
