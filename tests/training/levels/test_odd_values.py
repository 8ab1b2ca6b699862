"""Whatever a flag is given, the answer is a run or a usage error: no error of a library shows."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_curriculum import NoiseLevels
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.models.tiny import MINUSCULE, make_tiny_pipeline
from diffusers_curriculum.samplers import named_samplers
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.optimizers import build_lr_scheduler, build_optimizer
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from diffusers_curriculum.weighting import WEIGHTINGS
from tests.scripts.pipelines import with_scheduler
from tests.scripts.small_runs import Bench

ZERO_SNR = (
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "pipeline"
    make_tiny_pipeline(None, folder, resolution=8, vae_steps=0, sizes=MINUSCULE)
    return folder


def base(task: Any, pipeline: Path) -> list[str]:
    own = {
        TextToImage: ["--pretrained_model_name_or_path", str(pipeline), "--resolution", "8"],
        ClassConditional: ["--model_config", "DiT-S/2", "--resolution", "8"],
        Unconditional: ["--resolution", "32"],
    }
    return [*own[task], "--max_train_steps", "100"]


def chosen(task: Any, line: list[str]) -> None:
    """What a command line comes to before data and models are looked at."""
    one = task()
    with contextlib.redirect_stderr(io.StringIO()):
        args = one.parse(line, machine=False)
    one.choose(args, 0)
    optimizer = build_optimizer(args, [torch.nn.Parameter(torch.ones(1))], 1)
    build_lr_scheduler(args, optimizer, args.max_train_steps)
    ImageTransform.of(args)


def refused(task: Any, line: list[str]) -> str | None:
    """The error of a library that a command line shows."""
    try:
        chosen(task, line)
    except (UsageError, SystemExit):
        return None
    except Exception as error:
        return f"{' '.join(line[-3:])}: {error!r}"
    return None


def odd_parameters() -> Iterator[list[str]]:
    for name in (*DENSITIES, *named_samplers(), "two_phase"):
        law = ["--timestep_sampler", name]
        yield law
        odd = ("x=1", "b=0", "mu=nan", "std=-1", "switch_step=-1", "mu=a", "shift=0")
        for given in (*odd, "move_share=2", "move_steps=a", "positions=1"):
            yield [*law, "--timestep_sampler_args", given]
    for name in WEIGHTINGS:
        weighting = ["--loss_weighting", name]
        yield weighting
        for given in ("x=1", "gamma=0", "gamma=a", "k=-1", "measure=x", "terminal_weight=-1"):
            yield [*weighting, "--loss_weighting_args", given]


@pytest.mark.reliability
def test_an_odd_parameter_ends_in_a_usage_error(pipeline: Path) -> None:
    lines = [[*base(TextToImage, pipeline), *more] for more in odd_parameters()]
    assert [fault for line in lines if (fault := refused(TextToImage, line))] == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--ddpm_num_steps", "100000"], "--formulation ddpm: a schedule needs two or more"),
        (["--sampling_scheduler", "SchedulerMixin"], "is no scheduler of diffusers"),
        (["--sampling_scheduler", "IPNDMScheduler"], "IPNDMScheduler shows no table"),
        (["--timestep_sampler", "two_phase"], "two_phase needs .* switch_step=N"),
    ],
)
def test_what_is_told(pipeline: Path, more: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        chosen(Unconditional, [*base(Unconditional, pipeline), *more])


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("kind", ZERO_SNR)
def test_a_sampler_with_zero_terminal_snr_trains_on_the_table_of_ddpm(
    pipeline: Path, tmp_path: Path, kind: Any, betas: str
) -> None:
    """Some write a number for the zero that they would divide by, which for linear betas lies above
    the level before it."""
    settings: dict[str, Any] = {"beta_schedule": betas, "prediction_type": "v_prediction"}
    own = kind(rescale_betas_zero_snr=True, **settings)
    wanted = NoiseLevels.from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True, **settings))
    bench = with_scheduler(Bench(pipeline, tmp_path, tmp_path), tmp_path / "copy", own)
    task = TextToImage()
    line = [*base(TextToImage, bench.pipeline), "--loss_weighting", "min_snr"]
    task.choose(task.parse(line, machine=False), 0)
    assert torch.equal(task.levels.sampler.levels.log_snr, wanted.log_snr)
    assert type(task.levels.inference) is kind
    found = NoiseLevels.from_scheduler(own)
    assert torch.allclose(found.alpha, wanted.alpha, atol=1e-3)
    assert bool((found.log_snr.diff() < 0).all())
