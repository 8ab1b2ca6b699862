"""The command lines of class-conditional and unconditional training."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, EDMEulerScheduler, UNet2DModel

from diffusers_curriculum.pipelines import UnconditionalPipeline
from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from tests.training.command_lines import (
    build_class_parser,
    build_unconditional_parser,
    parse_class_args,
    parse_unconditional_args,
)

FIXTURE = Path(__file__).parents[2] / "fixtures" / "official_flags.json"
OFFICIAL: list[dict[str, Any]] = json.loads(FIXTURE.read_text())["train_unconditional.py"]
CLASS = ("--model_config", "DiT-S/2", "--dataset_name", "some/data")
DATA = ("--dataset_name", "some/data")
TYPES = {"int": int, "float": float, "str": str, None: None}


# -- the official flags of train_unconditional.py --------------------------------------------------


def unconditional_actions() -> dict[str, argparse.Action]:
    return {action.option_strings[-1]: action for action in build_unconditional_parser()._actions}


def test_the_fixture_holds_the_45_official_flags() -> None:
    assert len({fact["flag"] for fact in OFFICIAL}) == 45


@pytest.mark.parametrize("fact", OFFICIAL, ids=lambda fact: fact["flag"])
def test_official_flag_is_kept(fact: dict[str, Any]) -> None:
    action = unconditional_actions()[fact["flag"]]
    is_switch = isinstance(action, argparse._StoreTrueAction)
    assert is_switch == (fact["action"] == "store_true")
    assert action.default == fact["default"]
    assert type(action.default) is type(fact["default"])
    assert action.required == fact["required"]
    assert action.nargs == (0 if is_switch else fact["nargs"])
    assert action.type == TYPES[fact["type"]]
    assert set(fact["choices"] or ()) <= set(action.choices or ())
    assert bool(action.choices) == bool(fact["choices"])


@pytest.mark.parametrize("fact", OFFICIAL, ids=lambda fact: fact["flag"])
def test_official_abbreviations_mean_the_same(fact: dict[str, Any]) -> None:
    official = argparse.ArgumentParser()
    for other in OFFICIAL:
        official.add_argument(other["flag"], action="store_true")
    ours, flags = build_unconditional_parser(), [other["flag"] for other in OFFICIAL]
    for length in range(3, len(fact["flag"])):
        prefix = fact["flag"][:length]
        matches = [flag for flag in [*flags, "--help"] if flag.startswith(prefix)]
        if len(matches) == 1:
            assert ours.resolve(prefix) == fact["flag"]


def test_the_official_readme_commands_parse() -> None:
    flowers = (
        '--dataset_name="huggan/flowers-102-categories" --output_dir="ddpm-ema-flowers-64" '
        "--mixed_precision no --push_to_hub --hub_model_id owner/flowers --resolution=64 "
        "--center_crop --random_flip --train_batch_size=16 --num_epochs=100 --use_ema "
        "--gradient_accumulation_steps=1 --learning_rate=1e-4 --lr_warmup_steps=500"
    )
    args = parse_unconditional_args(shlex.split(flowers))
    assert (args.num_train_epochs, args.report_to, args.ema_decay) == (100, "tensorboard", 0.9999)
    kinds = args.formulation, args.prediction_type, args.loss_weighting
    assert kinds == ("ddpm", "epsilon", "none")


def test_x0_is_weighted_by_the_snr_as_officially() -> None:
    args = parse_unconditional_args([*DATA, "--prediction_type", "sample"])
    assert args.loss_weighting == "unit_epsilon"
    chosen = [*DATA, "--prediction_type", "sample", "--loss_weighting", "unit_sample"]
    assert parse_unconditional_args(chosen).loss_weighting == "unit_sample"


# -- defaults that depend on one another -----------------------------------------------------------


@pytest.mark.parametrize("parse", [parse_class_args, parse_unconditional_args])
@pytest.mark.parametrize(
    ("more", "sampler", "floor"),
    [
        ("", "uniform", None),
        ("--formulation flow", "uniform", None),
        ("--formulation edm", "edm", 0.0),  # log-normal, as in the paper
        ("--formulation edm --timestep_floor 0.2", "edm", 0.2),
        ("--formulation edm --timestep_sampler laplace", "laplace", None),
    ],
)
def test_what_is_drawn_by_default(parse: Any, more: str, sampler: str, floor: float) -> None:
    base = CLASS if parse is parse_class_args else DATA
    args = parse([*base, *more.split()])
    assert (args.timestep_sampler, args.timestep_floor) == (sampler, floor)
    assert args.prediction_type == (
        "epsilon" if parse is parse_unconditional_args and "formulation" not in more else None
    )


def saved_unconditional(folder: Path, scheduler: Any) -> Path:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    kind = DDPMPipeline if isinstance(scheduler, DDPMScheduler) else UnconditionalPipeline
    kind(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


def test_the_formulation_is_that_of_the_pretrained_pipeline(tmp_path: Path) -> None:
    edm = saved_unconditional(tmp_path / "edm", EDMEulerScheduler())
    args = parse_unconditional_args([*DATA, "--pretrained_model_name_or_path", str(edm)])
    assert (args.formulation, args.timestep_sampler, args.prediction_type) == ("edm", "edm", None)
    v = saved_unconditional(tmp_path / "v", DDPMScheduler(prediction_type="v_prediction"))
    args = parse_unconditional_args([*DATA, "--pretrained_model_name_or_path", str(v)])
    assert (args.formulation, args.prediction_type) == ("ddpm", None)


# -- wrong command lines ---------------------------------------------------------------------------


SHARED_MISTAKES = {
    "--flow_shift 3": "--flow_shift is 3.0.*--formulation flow",
    "--formulation flow --flow_shift 0": "--flow_shift is 0.0.*above 0",
    "--sigma_data 1": "--sigma_data is 1.0.*--formulation edm",
    "--formulation edm --sigma_min 9 --sigma_max 3": "--sigma_min is 9.0.*smaller",
    "--formulation edm --prediction_type sample": "--prediction_type.*--formulation ddpm",
    "--formulation flow --prediction_type epsilon": "is epsilon.*--formulation ddpm",
    "--formulation flow --learned_variance vlb": "--learned_variance vlb.*ignore",
    "--ddpm_beta_schedule lineal": "--ddpm_beta_schedule is 'lineal'.*squaredcos_cap_v2",
    "--discrete_timesteps": "--discrete_timesteps.*--formulation flow, mean_flow or edm",
    "--cache_latents": "--cache_latents.*--pretrained_vae_model_name_or_path",
    "--latent_crops 2": "--latent_crops is 2.*--cache_latents",
    "--power_ema 0.5": "--power_ema is 0.5.*0.28",
    "--power_ema_snapshot_steps 5": "--power_ema_snapshot_steps is 5.*--power_ema",
    "--revision main": "--revision is main.*--pretrained_model_name_or_path",
    "--eval_samples 7": "--eval_samples",
    "--eval_steps 7": "--eval_metrics",
    "--train_data_dir /nowhere/at/all": None,
}


@pytest.mark.parametrize("parse", [parse_class_args, parse_unconditional_args])
@pytest.mark.parametrize("line", [line for line, told in SHARED_MISTAKES.items() if told])
def test_a_mistake_is_told_with_its_remedy(parse: Any, line: str) -> None:
    base = CLASS if parse is parse_class_args else DATA
    with pytest.raises(UsageError, match=f"(?s){SHARED_MISTAKES[line]}"):
        parse([*base, *line.split()])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--dataset_name some/data", "--model_config nor --pretrained_model_name_or_path"),
        (
            "--model_config DiT-S/2 --dataset_name d --pretrained_model_name_or_path x/y "
            "--formulation ddpm",
            "both say which network",
        ),
        ("--model_config DiT-S/2", "neither --dataset_name nor --train_data_dir.*sub-folder per"),
        ("--model_config DiT-S/2 --dataset_name d --label_dropout 2", "--label_dropout is 2.0"),
        (
            "--model_config DiT-S/2 --dataset_name d --no_pictures --guidance_scale 3",
            "--guidance_scale is 3.0.*no_pictures",
        ),
    ],
)
def test_mistakes_of_the_class_conditional_script(line: str, told: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){told}"):
        parse_class_args(line.split())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--ema_power 0.5", "--ema_power is 0.5.*--use_ema"),
        ("--hub_private_repo", "--hub_private_repo.*--push_to_hub"),
        ("--num_epochs 0", "--num_epochs is 0.*at least 1"),
    ],
)
def test_mistakes_of_the_unconditional_script(line: str, told: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){told}"):
        parse_unconditional_args([*DATA, *line.split()])


def test_a_config_and_a_pipeline_exclude_each_other(tmp_path: Path) -> None:
    folder = saved_unconditional(tmp_path, DDPMScheduler())
    line = ["--pretrained_model_name_or_path", str(folder), "--model_config_name_or_path", "UNet"]
    with pytest.raises(UsageError, match="both say which network"):
        parse_unconditional_args([*DATA, *line])


def test_no_flag_of_the_class_conditional_script_lacks_help() -> None:
    assert all(action.help for action in build_class_parser()._actions)


# -- what a review found ---------------------------------------------------------------------------


def test_edm_in_latents_has_the_noise_of_its_data() -> None:
    vae = ["--pretrained_vae_model_name_or_path", "some/vae", "--formulation", "edm"]
    args = parse_class_args([*CLASS, *vae])
    assert args.timestep_sampler_args == {"p_mean": pytest.approx(-1.2 + math.log(2), abs=1e-5)}
    args = parse_class_args([*CLASS, *vae, "--sigma_data", "0.5"])
    assert args.timestep_sampler_args == {}
    chosen = [*vae, "--timestep_sampler", "edm"]  # by name: as the catalogue says
    assert parse_class_args([*CLASS, *chosen]).timestep_sampler_args == {}


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
def test_edm_goes_on_with_the_noise_of_its_pipeline(tmp_path: Path, sigma_data: float) -> None:
    folder = saved_unconditional(tmp_path, EDMEulerScheduler(sigma_data=sigma_data))
    args = parse_unconditional_args([*DATA, "--pretrained_model_name_or_path", str(folder)])
    shift = math.log(sigma_data / 0.5)
    expected = {"p_mean": pytest.approx(-1.2 + shift, abs=1e-5)} if shift else {}
    assert args.timestep_sampler_args == expected


def test_bias_flags_replace_the_log_normal_law() -> None:
    line = "--formulation edm --timestep_bias_strategy later"
    assert parse_class_args([*CLASS, *line.split()]).timestep_sampler == "timestep_bias"


def test_guidance_of_metrics_needs_no_pictures() -> None:
    line = "--no_pictures --guidance_scale 4 --eval_steps 5 --eval_metrics kid"
    model = ["--eval_feature_model", "some/classifier"]
    assert parse_class_args([*CLASS, *line.split(), *model]).guidance_scale == 4


@pytest.mark.parametrize(
    ("line", "drawn", "measured"),
    [
        ("", 1000, 1000),
        ("--ddpm_num_inference_steps 200", 200, 200),
        ("--sampling_scheduler DDIMScheduler", 1000, 50),
        ("--formulation flow", 50, 50),
        ("--formulation edm --ddpm_num_inference_steps 18", 18, 50),
        ("--formulation flow --ddpm_num_inference_steps 1000", 1000, 50),
        (
            "--eval_steps 9 --eval_metrics kid --eval_feature_model x/y "
            "--eval_num_inference_steps 50",
            1000,
            50,
        ),
    ],
)
def test_denoising_steps_fit_the_process(line: str, drawn: int, measured: int) -> None:
    args = parse_unconditional_args([*DATA, *line.split()])
    assert (args.validation_inference_steps, args.eval_num_inference_steps) == (drawn, measured)


@pytest.mark.parametrize("name", ["dit-b/2", "DiT-Q/2", "DiTB/2", "DiT-B/0"])
def test_a_misspelt_size_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UsageError, match=f"--model_config is {name}: write DiT-S/2"):
        parse_class_args(["--model_config", name, *DATA])


@pytest.mark.parametrize("flag", ["validation_steps", "validation_epochs"])
def test_pictures_that_are_never_drawn_are_not_timed(flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag} is 3.*--no_pictures"):
        parse_class_args([*CLASS, "--no_pictures", f"--{flag}", "3"])


# -- a weighting that is implied, and what was given -----------------------------------------------


@pytest.mark.parametrize(
    ("more", "weighting", "parameters"),
    [
        ("", "unit_epsilon", {}),
        ("--snr_gamma 5", "min_snr", {"gamma": 5.0}),
        ("--loss_weighting none", "none", {}),
        ("--loss_weighting sigmoid --loss_weighting_args bias=2", "sigmoid", {"bias": 2}),
    ],
)
def test_the_loss_of_samples_is_weighted_unless_told(
    more: str, weighting: str, parameters: dict[str, float]
) -> None:
    args = parse_unconditional_args([*DATA, "--prediction_type", "sample", *more.split()])
    assert (args.loss_weighting, args.loss_weighting_args) == (weighting, parameters)


def test_parameters_of_a_weighting_that_was_not_named_are_refused() -> None:
    line = [*DATA, "--prediction_type", "sample", "--loss_weighting_args", "normalise=True"]
    with pytest.raises(UsageError, match="no effect without --loss_weighting NAME"):
        parse_unconditional_args(line)


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ("--timestep_sampler uniform", "--timestep_sampler uniform both say"),
        ("--timestep_sampler_args mu=1", r"--timestep_sampler_args \{'mu': 1\} both say"),
    ],
)
def test_a_bias_replaces_nothing_that_was_given(more: str, shown: str) -> None:
    with pytest.raises(UsageError, match=shown):
        parse_unconditional_args([*DATA, "--timestep_bias_strategy", "earlier", *more.split()])


def test_without_matplotlib_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.installed
    monkeypatch.setattr(environment, "installed", lambda name: name != "matplotlib" and found(name))
    with pytest.raises(UsageError, match="need matplotlib: pip install"):
        parse_unconditional_args(DATA)
    parse_unconditional_args([*DATA, "--show_timesteps", "terminal"])


MEAN_FLOW = ("--formulation", "mean_flow")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--compile", "blocks"), "--compile blocks with --formulation mean_flow"),
        (("--attention", "flash"), "--attention flash with --formulation mean_flow"),
        (("--mixflow_gamma", "0.8"), "--mixflow_gamma 0.8 with --formulation mean_flow"),
        (("--learned_variance", "vlb"), "--learned_variance vlb with --formulation mean_flow"),
    ],
)
def test_what_two_times_cannot_go_with_is_refused(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_class_args([*CLASS, *MEAN_FLOW, *more])


def test_a_law_that_is_none_for_pairs_is_refused() -> None:
    for more, message in (
        (("--timestep_sampler", "loss_second_moment"), "follows the losses"),
        (("--importance_correction", "full"), "corrects by importance"),
    ):
        args = parse_class_args([*CLASS, *MEAN_FLOW, *more])
        with pytest.raises(UsageError, match=f"--formulation mean_flow: .*{message}"):
            ClassConditional().choose_levels(args, 0)


def test_pairs_are_drawn_by_the_papers_law_for_one_step() -> None:
    args = parse_class_args([*CLASS, *MEAN_FLOW])
    assert (args.timestep_sampler, args.timestep_floor) == ("logit_normal", 0.0)
    assert args.timestep_sampler_args == {"mean": -0.4, "std": 1.0}
    for task, line in ((ClassConditional(), CLASS), (Unconditional(), ["--train_data_dir", "x"])):
        own = task.parse([*line, *MEAN_FLOW], machine=False)
        assert (own.validation_inference_steps, own.eval_num_inference_steps) == (1, 1)
    other = parse_class_args([*CLASS, *MEAN_FLOW, "--timestep_sampler", "uniform"])
    assert other.timestep_sampler == "uniform"
    assert other.timestep_floor is None


def test_shards_are_refused() -> None:
    task = ClassConditional()
    task.parse([*CLASS, *MEAN_FLOW], machine=False)
    task.check_engine(False)
    with pytest.raises(UsageError, match="shards of FSDP2"):
        task.check_engine(True)
