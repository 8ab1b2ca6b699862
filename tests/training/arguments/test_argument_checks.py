"""Wrong invocations: each refused before a model is loaded, with the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_curriculum.cli.analyze import ANALYSIS
from diffusers_curriculum.cli.calibrate import CALIBRATION
from diffusers_curriculum.training.arguments import curriculum, noise_levels
from diffusers_curriculum.training.arguments import environment as environment_checks
from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.optimizer import LR_SCHEDULERS
from diffusers_curriculum.training.errors import ExitCode, UsageError
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from tests.training import command_lines as arguments

MODEL = "--pretrained_model_name_or_path some/model "
BASE = MODEL + "--dataset_name some/data "
CURRICULUM = BASE + "--curriculum difficulty "

TASKS = (TextToImage, ClassConditional, Unconditional)
NUMBERS: dict[object, str] = {int: "2", float: "0.5"}

# Command line after BASE -> what the message must say: the value, then the remedy.
WRONG = {
    # out of range
    "--train_batch_size 0": ("--train_batch_size is 0", "at least 1"),
    "--gradient_accumulation_steps -1": ("is -1", "at least 1"),
    "--resolution 0": ("--resolution is 0", "at least 1"),
    "--max_train_steps 0": ("--max_train_steps is 0", "at least 1"),
    "--num_train_epochs 0": ("--num_train_epochs is 0", "at least 1"),
    "--max_train_samples 0": ("--max_train_samples is 0", "at least 1"),
    "--log_every 0": ("--log_every is 0", "at least 1"),
    "--timestep_plot_steps 0": ("--timestep_plot_steps is 0", "at least 1"),
    "--checkpointing_steps -5": ("--checkpointing_steps is -5", "at least 1"),
    "--checkpoints_total_limit 0": ("--checkpoints_total_limit is 0", "at least 1"),
    "--validation_epochs 0": ("--validation_epochs is 0", "at least 1"),
    "--dataloader_num_workers -1": ("--dataloader_num_workers is -1", "at least 0"),
    "--learning_rate -1e-4": ("--learning_rate is -0.0001", "not negative"),
    "--learning_rate nan": ("--learning_rate is nan", "finite"),
    "--lr_warmup_steps -1": ("--lr_warmup_steps is -1", "at least 0"),
    "--adam_beta1 1": ("--adam_beta1 is 1.0", "in [0, 1)"),
    "--adam_beta2 -0.1": ("--adam_beta2 is -0.1", "in [0, 1)"),
    "--max_grad_norm 0": ("--max_grad_norm is 0.0", "above 0"),
    "--noise_offset nan": ("--noise_offset is nan", "finite"),
    "--caption_dropout 1.5": ("--caption_dropout is 1.5", "in [0, 1]"),
    "--seed -1": ("--seed is -1", "in [0, 2^32)"),
    "--snr_gamma 0": ("--snr_gamma is 0.0", "above 0"),
    "--use_ema --ema_decay 1.1": ("--ema_decay is 1.1", "in [0, 1]"),
    "--use_ema --ema_interval 0": ("--ema_interval is 0", "at least 1"),
    "--timestep_sampler laplace --timestep_floor 2": ("--timestep_floor is 2.0", "in [0, 1]"),
    "--curriculum difficulty --curriculum_patience -3": ("is -3", "at least 1"),
    "--curriculum difficulty --curriculum_clusters 1": ("--curriculum_clusters is 1", "at least 2"),
    "--curriculum difficulty --curriculum_smoothing 1": ("smoothing is 1.0", "in [0, 1)"),
    "--max_hours 0": ("--max_hours is 0.0", "greater than 0"),
    "--max_hours nan": ("--max_hours is nan", "greater than 0"),
    "--curriculum difficulty --curriculum_max_share 0": ("max_share is 0.0", "greater than 0"),
    "--curriculum difficulty --curriculum_min_delta -1": ("min_delta is -1.0", "not negative"),
    "--curriculum difficulty --curriculum_min_size 0": ("min_size is 0", "at least 1"),
    # unknown names and malformed values
    "--lr_scheduler cosin": ("'cosin'", "cosine_with_restarts"),
    "--lr_scheduler piecewise_constant": ("'piecewise_constant'", "choose from linear"),
    "--prediction_type eps": ("'eps'", "choose from epsilon, v_prediction, sample"),
    "--report_to tensorbord": ("'tensorbord'", "tensorboard, wandb"),
    "--timestep_sampler laplace --timestep_sampler_args mu:1": ("'mu:1'", "KEY=VALUE"),
    "--timestep_sampler laplace --timestep_sampler_args b=1 b=2": ("'b=2'", "once"),
    "--loss_weighting p2 --loss_weighting_args k=1,2": ("'k=1,2'", "finite number"),
    # conflicts and missing partners
    "--snr_gamma 5 --loss_weighting p2": ("5.0", "'p2'", "drop one"),
    "--snr_gamma 5 --loss_weighting_args gamma=1": ("5.0", "gamma=1", "give one"),
    "--report_to wandb --hub_token hf_x": ("wandb", "hf auth login"),
    "--report_to comet_ml --hub_token hf_x": ("comet_ml", "hf auth login"),
    "--curriculum difficulty --curriculum_clustering explicit": ("explicit", "_boundaries"),
    "--curriculum difficulty --curriculum_pacing fixed": ("fixed", "--curriculum_stage_steps INT"),
    "--curriculum difficulty --curriculum_pacing root": ("root", "--curriculum_total_steps INT"),
    "--curriculum difficulty --curriculum_min_stage_steps 9 --curriculum_max_stage_steps 8": (
        "max_stage_steps is 8",
        "min_stage_steps 9",
        "raise the one",
    ),
    "--curriculum difficulty --curriculum_clustering explicit --curriculum_boundaries 0 9 9": (
        "0 9 9",
        "larger than the one before",
    ),
    "--curriculum difficulty --curriculum_clustering explicit --curriculum_boundaries -1 9": (
        "boundaries is -1",
        "at least 0",
    ),
    "--curriculum difficulty --curriculum_clustering explicit --curriculum_boundaries 5 9": (
        "5 9",
        "begin with 0",
    ),
    # without effect
    "--curriculum_order random": ("random", "no effect", "--curriculum difficulty"),
    "--curriculum_clusters 5": ("is 5", "no effect", "--curriculum difficulty"),
    "--curriculum_clustering snr": ("is snr", "no effect", "--curriculum difficulty"),
    "--curriculum_boundaries 0 5": ("[0, 5]", "no effect", "--curriculum difficulty"),
    "--curriculum_within balanced": ("balanced", "no effect", "--curriculum difficulty"),
    "--curriculum_pacing fixed": ("fixed", "no effect", "--curriculum difficulty"),
    "--curriculum_patience 10": ("is 10", "no effect", "--curriculum difficulty"),
    "--curriculum_max_share 0.5": ("0.5", "no effect", "--curriculum difficulty"),
    "--curriculum difficulty --curriculum_boundaries 0 5": ("no effect", "clustering explicit"),
    "--curriculum difficulty --curriculum_clustering quantile --curriculum_min_size 2": (
        "min_size is 2",
        "auto, log_snr or snr",
    ),
    "--curriculum difficulty --curriculum_clustering explicit --curriculum_boundaries 0 5 "
    "--curriculum_clusters 2": ("clusters is 2", "other than explicit"),
    "--curriculum difficulty --curriculum_stage_steps 5": ("is 5", "--curriculum_pacing fixed"),
    "--curriculum difficulty --curriculum_total_steps 5": ("is 5", "linear, cosine or root"),
    "--curriculum difficulty --curriculum_pacing fixed --curriculum_stage_steps 5 "
    "--curriculum_patience 9": ("patience is 9", "--curriculum_pacing patience"),
    "--curriculum difficulty --curriculum_pacing fixed --curriculum_stage_steps 5 "
    "--curriculum_max_stage_steps 9": ("is 9", "--curriculum_pacing patience"),
    "--timestep_sampler_args b=1": ("b=1", "no effect", "other than uniform"),
    "--timestep_floor 0.5": ("0.5", "no effect", "other than uniform"),
    "--importance_correction full": ("full", "no effect", "other than uniform"),
    "--curriculum difficulty --importance_correction full": ("full", "_within balanced"),
    "--loss_weighting_args gamma=5": ("gamma=5", "no effect", "--loss_weighting NAME"),
    "--ema_decay 0.9": ("0.9", "no effect", "--use_ema"),
    "--ema_interval 2": ("is 2", "no effect", "--use_ema"),
    "--offload_ema": ("--offload_ema is set", "--use_ema"),
    "--foreach_ema": ("--foreach_ema is set", "--use_ema"),
    "--dream_detail_preservation 10": ("10.0", "no effect", "--dream_training"),
    "--validation_steps 5": ("is 5", "no effect", "--validation_prompts"),
    # folders and names
    "--pretrained_model_name_or_path ./none/such": ("./none/such", "no such folder", "repository"),
    "--resume_from_checkpoint checkpoint-7": ("checkpoint-7", "sd-model-finetuned", "latest"),
    "--resume_from_checkpoint /none/checkpoint-7": ("no folder /none/checkpoint-7", "latest"),
    "--resume_from_checkpoint ../checkpoint-7": ("no folder", "latest"),
    "--show_timesteps picture.jpg": ("picture.jpg", ".png"),
    "--show_timesteps none/such/picture.png": ("no folder none/such", "Create"),
    "--push_to_hub --hub_model_id a/b/c": ("'a/b/c'", "--hub_model_id"),
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_invocation_is_refused_with_value_and_remedy(line: str):
    with pytest.raises(UsageError) as error:
        arguments.parse_args((BASE + line).split())
    for fragment in WRONG[line]:
        assert fragment in str(error.value)


# What argparse itself refuses: exit status 2 and a line on stderr.
REFUSED = {
    "--train_batch_size many": ("--train_batch_size", "'many'"),
    "--mixed_precision fp8": ("'fp8'", "fp16", "bf16"),
    "--image_interpolation_mode cubic": ("'cubic'", "bicubic"),
    "--timestep_draw sobal": ("'sobal'", "sobol"),
    "--curriculum hard": ("'hard'", "difficulty"),
    "--curriculum_order easy": ("'easy'", "easy_to_hard"),
    "--curriculum_clustering kmeans": ("'kmeans'", "log_snr_width"),
    "--curriculum_pacing exponential": ("'exponential'", "patience"),
    "--curriculum_within all": ("'all'", "balanced"),
    "--importance_correction half": ("'half'", "none, full or an exponent"),
    "--importance_correction 1.5": ("'1.5'", "in [0, 1]"),
    "--importance_correction nan": ("'nan'", "in [0, 1]"),
    "--curriculum_boundaries 1 b": ("'b'", "--curriculum_boundaries"),
    "--curicculum difficulty": ("--curicculum", "did you mean --curriculum"),
    "--lr_ 5": ("--lr_", "--lr_scheduler, --lr_warmup_steps"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_malformed_invocation_exits_2(line: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        arguments.parse_args((BASE + line).split())
    assert stop.value.code == ExitCode.USAGE == 2
    message = capsys.readouterr().err
    for fragment in REFUSED[line]:
        assert fragment in message


def test_model_is_required(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        arguments.parse_args(["--dataset_name", "some/data"])
    assert stop.value.code == 2
    assert "--pretrained_model_name_or_path" in capsys.readouterr().err


def test_data_is_required():
    with pytest.raises(UsageError, match="neither --dataset_name nor --train_data_dir"):
        arguments.parse_args(MODEL.split())
    with pytest.raises(UsageError, match=r"small.*no effect without --dataset_name"):
        arguments.parse_args([*MODEL.split(), "--dataset_config_name", "small"])
    picture = arguments.parse_args([*MODEL.split(), "--show_timesteps", "timesteps.png"])
    assert picture.show_timesteps == "timesteps.png"


@pytest.mark.parametrize(
    ("kind", "problem"),
    [("absent", "no such folder"), ("file", "it is a file"), ("empty", "the folder is empty")],
)
def test_bad_image_folder(tmp_path: Path, kind: str, problem: str):
    folder = tmp_path / "images"
    if kind == "file":
        folder.write_text("")
    if kind == "empty":
        (folder / "nothing").mkdir(parents=True)
    with pytest.raises(UsageError) as error:
        arguments.parse_args([*MODEL.split(), "--train_data_dir", str(folder)])
    assert problem in str(error.value)
    assert str(folder) in str(error.value)
    assert "metadata" in str(error.value)


def test_good_image_folder(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("")
    argv = [*MODEL.split(), "--train_data_dir", str(tmp_path)]
    assert arguments.parse_args(argv).train_data_dir == str(tmp_path)
    inside_a_data_set = [*BASE.split(), "--train_data_dir", "folder/in/repository"]
    assert arguments.parse_args(inside_a_data_set).dataset_name == "some/data"


@pytest.mark.parametrize("below", ["", "/run/one"])
def test_output_folder_that_is_a_file(tmp_path: Path, below: str):
    file = tmp_path / "output"
    file.write_text("")
    with pytest.raises(UsageError, match=f"{file} is a file. Name a folder"):
        arguments.parse_args([*BASE.split(), "--output_dir", f"{file}{below}"])


def test_good_resume_paths(tmp_path: Path):
    inside, elsewhere = tmp_path / "run" / "checkpoint-2", tmp_path / "other" / "checkpoint-4"
    inside.mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    start = [*BASE.split(), "--output_dir", str(inside.parent), "--resume_from_checkpoint"]
    for name in ("latest", "checkpoint-2", str(inside), str(elsewhere)):
        assert arguments.parse_args([*start, name]).resume_from_checkpoint == name
    # A path is literal: its last part is not looked up in the output folder.
    with pytest.raises(UsageError, match="there is no folder"):
        arguments.parse_args([*start, str(elsewhere.parent / "checkpoint-2")])


@pytest.mark.parametrize(
    ("line", "package", "remedy"),
    [
        ("--enable_xformers_memory_efficient_attention", "xformers", "pip install xformers"),
        ("--report_to wandb", "wandb", "another tracker"),
        ("--report_to comet_ml", "comet_ml", "pip install comet_ml"),
        ("--show_timesteps t.png", "matplotlib", "pip install matplotlib"),
    ],
)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, line: str, package: str, remedy: str):
    monkeypatch.setattr(environment_checks, "installed", lambda name: name != package)
    with pytest.raises(UsageError) as error:
        arguments.parse_args((BASE + line).split())
    assert line.split()[0] in str(error.value)
    assert remedy in str(error.value)


def test_one_of_two_tensorboard_packages_is_enough(monkeypatch: pytest.MonkeyPatch):
    there = {"tensorboardX", "matplotlib"}
    monkeypatch.setattr(environment_checks, "installed", lambda name: name in there)
    assert arguments.parse_args(BASE.split()).report_to == "tensorboard"
    there.remove("tensorboardX")
    with pytest.raises(UsageError, match="tensorboard is not installed"):
        arguments.parse_args(BASE.split())
    assert arguments.parse_args([*BASE.split(), "--report_to", "all"]).report_to == "all"


@pytest.mark.parametrize("available", [False, True])
def test_xformers_needs_a_cuda_device(monkeypatch: pytest.MonkeyPatch, available: bool):
    line = [*BASE.split(), "--enable_xformers_memory_efficient_attention"]
    monkeypatch.setattr(environment_checks, "installed", lambda name: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    if available:
        assert arguments.parse_args(line).enable_xformers_memory_efficient_attention
    else:
        with pytest.raises(UsageError, match="needs a CUDA device"):
            arguments.parse_args(line)


def test_installed_looks_without_importing():
    assert environment_checks.installed("json")
    assert not environment_checks.installed("no_such_package_at_all")


@pytest.mark.parametrize("line", [*(task.command_line for task in TASKS), ANALYSIS, CALIBRATION])
def test_every_number_has_a_bound(line: CommandLine):
    numbers = [flag for flag in line.flags if flag.type in (int, float)]
    # the widths of power-function averages are checked together
    assert {flag.name for flag in numbers if flag.bound is None} <= {"power_ema"}


def test_infinite_gradient_norm_means_no_clipping():
    assert arguments.parse_args([*BASE.split(), "--max_grad_norm", "inf"]).max_grad_norm > 1e300


def test_every_curriculum_option_needs_a_curriculum():
    for action in arguments.build_parser()._actions:
        if action.dest.startswith("curriculum_"):
            word = list(action.choices)[-1] if action.choices else NUMBERS[action.type]
            with pytest.raises(UsageError, match=r"has no effect without --curriculum difficulty"):
                arguments.parse_args([*BASE.split(), action.option_strings[0], word])


@pytest.mark.parametrize("option", ["min_delta", "smoothing", "min_stage_steps"])
def test_what_only_patience_uses(option: str):
    line = f"--curriculum_pacing root --curriculum_total_steps 9 --curriculum_{option} "
    value = "0.5" if option != "min_stage_steps" else "5"
    with pytest.raises(UsageError, match=f"{option} is {value}.*--curriculum_pacing patience"):
        arguments.parse_args((CURRICULUM + line + value).split())


def test_what_is_given_counts_whatever_its_value():
    argv = [*BASE.split(), "--curriculum_patience", "200"]  # the default
    with pytest.raises(UsageError, match="--curriculum_patience is 200, which has no effect"):
        arguments.parse_args(argv)


def test_scheduler_names_are_diffusers_own():
    from diffusers.optimization import SchedulerType

    names = {kind.value for kind in SchedulerType} - {"piecewise_constant"}
    assert set(LR_SCHEDULERS) == names


def test_names_are_those_of_the_library():
    from diffusers_curriculum import clustering, pacing, randomness
    from diffusers_curriculum.samplers import stages

    assert ("auto", *clustering.CLUSTERINGS) == curriculum.CLUSTERINGS
    assert set(curriculum.PACINGS) == set(pacing.PACINGS)
    assert set(noise_levels.DRAWS) == set(randomness.DRAWS)
    assert curriculum.ORDERS == stages.ORDERS
    assert curriculum.WITHIN == stages.WITHIN


@pytest.mark.parametrize("option", ["--timestep_floor 0", "--importance_correction full"])
def test_balanced_clusters_differ_from_the_uniform_law(option: str):
    arguments.parse_args((CURRICULUM + "--curriculum_within balanced " + option).split())
