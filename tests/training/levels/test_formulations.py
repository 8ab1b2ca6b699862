"""From flags and pretrained pipelines to the schedulers of training and sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.pipelines import UnconditionalPipeline
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.formulations import build_schedulers, formulation_of
from diffusers_curriculum.training.storage.fingerprints import schedule_identity
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from tests.training.command_lines import parse_class_args, parse_unconditional_args

CLASS = ("--model_config", "DiT-S/2", "--dataset_name", "some/data")
FRESH = (
    pytest.param(parse_class_args, CLASS, "DDIMScheduler", id="class"),
    pytest.param(parse_unconditional_args, CLASS[2:], "DDPMScheduler", id="unconditional"),
)


def schedulers(
    line: str,
    *,
    pixels: bool = True,
    parse: Any = parse_class_args,
    base: Any = CLASS,
    default: str = "DDIMScheduler",
) -> tuple[Any, Any]:
    return build_schedulers(parse([*base, *line.split()]), pixels=pixels, default_vp=default)


# -- made from flags -------------------------------------------------------------------------------


@pytest.mark.parametrize(("parse", "base", "default"), FRESH)
def test_a_new_ddpm_is_the_official_one(parse: Any, base: Any, default: str) -> None:
    training, sampling = schedulers("", parse=parse, base=base, default=default)
    assert type(training) is DDPMScheduler
    assert type(sampling).__name__ == default
    powers = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for scheduler in (training, sampling):
        assert np.allclose(scheduler.alphas_cumprod, powers, rtol=1e-4)
        assert scheduler.config["prediction_type"] == "epsilon"
        assert scheduler.config["clip_sample"] is True  # pixels lie in [-1, 1]
    latents = schedulers("", pixels=False, parse=parse, base=base, default=default)
    assert [scheduler.config["clip_sample"] for scheduler in latents] == [False, False]


def test_the_flags_of_ddpm() -> None:
    line = "--ddpm_num_steps 50 --ddpm_beta_schedule squaredcos_cap_v2 --prediction_type sample"
    for scheduler in schedulers(line):
        s = np.arange(51) / 50
        bars = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
        powers = np.cumprod(np.maximum(bars[1:] / bars[:-1], 0.001))  # arXiv 2102.09672, eq. 17
        assert np.allclose(scheduler.alphas_cumprod, powers, rtol=1e-3)
        assert scheduler.config["prediction_type"] == "sample"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_shift_of_a_flow(shift: float) -> None:
    line = "--formulation flow" + ("" if shift == 1 else f" --flow_shift {shift}")
    training, sampling = schedulers(line)
    uniform = np.arange(1, 1001) / 1000
    sigma = shift * uniform / (1 + (shift - 1) * uniform)  # arXiv 2403.03206, eq. 23
    for scheduler in (training, sampling):
        assert type(scheduler) is FlowMatchEulerDiscreteScheduler
        levels = NoiseLevels.from_scheduler(scheduler)
        assert np.allclose(levels.sigma, sigma, atol=1e-6)
        assert np.allclose(levels.timesteps, 1000 * sigma, atol=1e-3)


@pytest.mark.parametrize("pixels", [True, False])
def test_the_range_and_the_data_of_edm(pixels: bool) -> None:
    training, sampling = schedulers("--formulation edm", pixels=pixels)
    for scheduler in (training, sampling):
        assert type(scheduler) is EDMEulerScheduler
        levels = NoiseLevels.from_scheduler(scheduler)
        assert levels.sigma_data == (0.5 if pixels else 1.0)
        scale = 1 if pixels else 2  # the paper's noise for data of twice the deviation
        assert np.allclose(levels.sigma[[0, -1]], [0.002 * scale, 80 * scale], rtol=1e-5)
        assert levels.prediction_type == "edm"
    line = "--formulation edm --sigma_min 0.01 --sigma_max 20 --sigma_data 0.7"
    levels = NoiseLevels.from_scheduler(schedulers(line, pixels=pixels)[0])
    assert levels.sigma_data == 0.7
    assert np.allclose(levels.sigma[[0, -1]], [0.01, 20], rtol=1e-5)


@pytest.mark.parametrize(("flag", "place", "other"), [("min", 0, 160), ("max", -1, 0.004)])
def test_an_end_of_edms_range_that_is_given_is_taken_as_it_is(
    flag: str, place: int, other: float
) -> None:
    """Also where it is the default, which other data would scale."""
    value = {"min": 0.002, "max": 80.0}[flag]
    line = f"--formulation edm --sigma_{flag} {value}"
    sigma = NoiseLevels.from_scheduler(schedulers(line, pixels=False)[0]).sigma
    assert np.allclose(sigma[[place, -1 - place]], [value, other], rtol=1e-5)


def test_resuming_tells_sigma_data_apart() -> None:
    def identity(line: str) -> dict[str, Any]:
        return schedule_identity(NoiseLevels.from_scheduler(schedulers(line)[0]))

    assert identity("--formulation edm") == identity("--formulation edm --sigma_data 0.5")
    assert identity("--formulation edm") != identity("--formulation edm --sigma_data 1")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("", "epsilon"),
        ("--prediction_type epsilon", "epsilon"),
        ("--prediction_type v_prediction", "v_prediction"),
        ("--prediction_type sample", "sample"),
        ("--formulation flow", "flow"),
        ("--formulation edm", "edm"),
    ],
)
def test_what_is_predicted(line: str, kind: str) -> None:
    words = [*CLASS, *line.split()]
    levels = ClassConditional().choose_levels(parse_class_args(words), 0)
    assert levels.objective.prediction_type == kind
    assert NoiseLevels.from_scheduler(levels.inference).prediction_type == kind
    assert levels.sampler.continuous == (kind in ("flow", "edm"))
    if levels.sampler.continuous:
        discrete = parse_class_args([*words, "--discrete_timesteps"])
        assert not ClassConditional().choose_levels(discrete, 0).sampler.continuous


# -- which scheduler samples -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("--sampling_scheduler DPMSolverMultistepScheduler", DPMSolverMultistepScheduler),
        ("--sampling_scheduler EulerDiscreteScheduler", EulerDiscreteScheduler),
        ("--sampling_scheduler DDPMScheduler --prediction_type v_prediction", DDPMScheduler),
        (
            "--formulation flow --sampling_scheduler FlowMatchHeunDiscreteScheduler",
            FlowMatchHeunDiscreteScheduler,
        ),
        (
            "--formulation edm --sigma_max 20 --sampling_scheduler EDMDPMSolverMultistepScheduler",
            EDMDPMSolverMultistepScheduler,
        ),
    ],
)
def test_another_scheduler_may_sample(line: str, kind: Any) -> None:
    training, sampling = schedulers(line)
    assert type(sampling) is kind
    mine, theirs = (NoiseLevels.from_scheduler(one) for one in (training, sampling))
    assert (mine.prediction_type, mine.family) == (theirs.prediction_type, theirs.family)
    # diffusers' Euler for EDM has one level more
    assert np.allclose(mine.sigma[[0, -1]], theirs.sigma[[0, -1]], rtol=1e-4)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--sampling_scheduler FlowMatchEulerDiscreteScheduler", "no prediction_type"),
        ("--sampling_scheduler EDMEulerScheduler", "--formulation ddpm"),
        ("--formulation flow --sampling_scheduler DDIMScheduler", "--formulation flow"),
        ("--formulation flow --sampling_scheduler EDMEulerScheduler", ""),
        (
            "--formulation edm --sampling_scheduler FlowMatchEulerDiscreteScheduler",
            "no prediction_type",
        ),
        ("--formulation edm --sampling_scheduler EulerDiscreteScheduler", "--formulation edm"),
        ("--sampling_scheduler UNet2DModel", "no scheduler of diffusers.*DDIMScheduler"),
        ("--sampling_scheduler DDIMSheduler", "no scheduler of diffusers.*DDIMScheduler"),
        ("--sampling_scheduler __name__", "no scheduler of diffusers"),
    ],
)
def test_one_that_cannot_is_refused(line: str, told: str) -> None:
    name = line.split()[-1]
    with pytest.raises(UsageError, match=f"(?s)--sampling_scheduler.*{name}.*{told}"):
        schedulers(line)


# -- of a pretrained pipeline ----------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Arguments]:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        layers_per_block=1,
    )

    def save(scheduler: Any, line: str = "") -> Arguments:
        UnconditionalPipeline(scheduler, unet=unet).save_pretrained(tmp_path)
        base = ["--dataset_name", "d", "--pretrained_model_name_or_path", str(tmp_path)]
        return parse_unconditional_args([*base, *line.split()])

    return save


OWN: dict[str, tuple[Any, str]] = {
    "ddpm": (DDIMScheduler(beta_start=2e-4, clip_sample=False, prediction_type="sample"), "ddpm"),
    "v": (DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"), "ddpm"),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=4.0), "flow"),
    "edm": (EDMEulerScheduler(sigma_min=0.01, sigma_max=30.0, sigma_data=0.8), "edm"),
}


@pytest.mark.parametrize("name", OWN)
def test_the_own_scheduler_is_kept(saved: Any, name: str) -> None:
    own, formulation = OWN[name]
    args = saved(own)
    assert args.formulation == formulation_of(args) == formulation
    training, sampling = build_schedulers(args, pixels=False, default_vp="DDPMScheduler")
    assert type(sampling) is type(own)
    wanted = NoiseLevels.from_scheduler(own)
    for scheduler in (training, sampling):
        levels = NoiseLevels.from_scheduler(scheduler)
        assert np.array_equal(levels.sigma, wanted.sigma)
        assert (levels.prediction_type, levels.sigma_data) == (
            wanted.prediction_type,
            wanted.sigma_data,
        )
    settings = {key: value for key, value in own.config.items() if not key.startswith("_")}
    assert {key: sampling.config[key] for key in settings} == settings


def test_only_what_a_flag_says_is_changed(saved: Any) -> None:
    own = DDPMScheduler(num_train_timesteps=100, beta_start=2e-4, beta_end=0.03)
    line = "--ddpm_beta_schedule scaled_linear --prediction_type v_prediction"
    training, sampling = build_schedulers(saved(own, line), pixels=True, default_vp="DDIMScheduler")
    powers = np.cumprod(1 - np.linspace(2e-4**0.5, 0.03**0.5, 100) ** 2)
    for scheduler in (training, sampling):
        assert type(scheduler) is DDPMScheduler
        assert np.allclose(scheduler.alphas_cumprod, powers, rtol=1e-4)
        assert scheduler.config["prediction_type"] == "v_prediction"
    edm = EDMEulerScheduler(sigma_min=0.01, sigma_max=30.0, sigma_data=0.8)
    args = saved(edm, "--sigma_max 20")
    levels = NoiseLevels.from_scheduler(build_schedulers(args, pixels=True, default_vp="")[0])
    assert levels.sigma_data == 0.8
    assert np.allclose(levels.sigma[[0, -1]], [0.01, 20], rtol=1e-5)


@pytest.mark.parametrize(
    ("own", "line", "found"),
    [
        (DDPMScheduler(num_train_timesteps=500), "--ddpm_num_steps 1000", 1000),
        (DDPMScheduler(num_train_timesteps=500), "", 500),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "--flow_shift 1", 1.0),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "", 3.0),
    ],
)
def test_a_flag_with_its_default_value_counts_over_a_pipelines_own(
    saved: Any, own: Any, line: str, found: float
) -> None:
    name = "shift" if "shift" in own.config else "num_train_timesteps"
    for scheduler in build_schedulers(saved(own, line), pixels=True, default_vp="DDPMScheduler"):
        assert scheduler.config[name] == found
        assert len(NoiseLevels.from_scheduler(scheduler)) == (1000 if name == "shift" else found)


def test_another_formulation_starts_from_its_own_defaults(saved: Any) -> None:
    args = saved(DDPMScheduler(num_train_timesteps=100), "--formulation flow --flow_shift 2")
    training, sampling = build_schedulers(args, pixels=True, default_vp="DDPMScheduler")
    assert (type(training), type(sampling)) == (FlowMatchEulerDiscreteScheduler,) * 2
    assert (training.config.num_train_timesteps, training.config.shift) == (1000, 2.0)


@pytest.mark.parametrize("what", ["file", "no folder", "no index", "no scheduler"])
def test_a_pipeline_that_cannot_be_read_is_refused(saved: Any, tmp_path: Path, what: str) -> None:
    args = saved(DDPMScheduler())
    if what == "no scheduler":
        (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    elif what == "no index":
        (tmp_path / "model_index.json").unlink()
    else:
        args.pretrained_model_name_or_path = str(tmp_path / "nothing")
    if what == "file":
        (tmp_path / "nothing").write_text("")
    with pytest.raises(UsageError, match=r"--pretrained_model_name_or_path '/"):
        build_schedulers(args, pixels=True, default_vp="DDPMScheduler")
