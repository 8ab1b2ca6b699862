"""The command line of train_class_conditional_curriculum.py, in the words of diffusers' scripts.

Importing this module loads no model code.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from diffusers_curriculum.training.arguments.checks import DEPENDENCES, Dependence
from diffusers_curriculum.training.arguments.evaluation import add_evaluation_arguments
from diffusers_curriculum.training.arguments.images import (
    BETA_SCHEDULES,
    IMAGE_DEPENDENCES,
    add_formulation_arguments,
    add_network_arguments,
    add_power_ema_arguments,
    check_image_arguments,
    check_network_name,
    settle_formulation,
)
from diffusers_curriculum.training.arguments.official import (
    add_checkpoint_arguments,
    add_ema_arguments,
    add_image_arguments,
    add_optimizer_arguments,
    add_output_arguments,
    add_precision_arguments,
    add_run_arguments,
    add_source_arguments,
)
from diffusers_curriculum.training.arguments.parser import OfficialFirstParser
from diffusers_curriculum.training.arguments.text_to_image import add_loop_arguments, parse_checked
from diffusers_curriculum.training.arguments.timesteps import (
    add_curriculum_arguments,
    add_pacing_arguments,
    add_timestep_arguments,
)
from diffusers_curriculum.training.errors import UsageError

CLASS_DEPENDENCES = (
    *DEPENDENCES,
    *IMAGE_DEPENDENCES,
    Dependence(
        "revision variant",
        "--pretrained_model_name_or_path",
        lambda a: a.pretrained_model_name_or_path is not None,
    ),
    Dependence(
        "validation_classes validation_images_per_class validation_inference_steps "
        "validation_steps validation_epochs",
        "pictures (drop --no_pictures)",
        lambda a: not a.no_pictures,
    ),
    Dependence(
        "guidance_scale",
        "pictures (drop --no_pictures) or --eval_steps",
        lambda a: not a.no_pictures or a.eval_steps is not None,
    ),
)


def parse_class_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check a command line (default: the program's own), before any model is loaded.

    Raises:
        UsageError: an argument is wrong, missing or without effect; the message says what to do.
        SystemExit: status 2 for what argparse itself refuses, with a message on stderr.
    """
    args = parse_checked(build_class_parser(), argv, CLASS_DEPENDENCES, settle_formulation)
    check_image_arguments(args)
    check_network_name("model_config", args.model_config)
    if args.model_config is None and args.pretrained_model_name_or_path is None:
        raise UsageError(
            "neither --model_config nor --pretrained_model_name_or_path is given: name a network "
            "to train from scratch, such as --model_config DiT-B/2, or a pipeline to go on from."
        )
    if args.model_config is not None and args.pretrained_model_name_or_path is not None:
        raise UsageError(
            f"--model_config {args.model_config} and --pretrained_model_name_or_path "
            f"{args.pretrained_model_name_or_path} both say which network: drop one of the two."
        )
    return args


def build_class_parser() -> OfficialFirstParser:
    """The parser; families of flags that diffusers' scripts share keep their names."""
    parser = OfficialFirstParser(
        description="Train a class-conditional DiT or U-Net with a curriculum over noise levels "
        "and importance sampling."
    )
    _add_model_arguments(parser)
    group = parser.add_argument_group("data")
    add_source_arguments(group)
    group.add_argument("--label_column", default="label", help="column with the classes")
    group.add_argument(
        "--label_dropout",
        type=float,
        default=0.1,
        help="share of samples trained without their class, for classifier-free guidance",
    )
    add_image_arguments(group)
    for add in (
        add_network_arguments,
        add_run_arguments,
        add_optimizer_arguments,
        add_ema_arguments,
        add_precision_arguments,
        add_output_arguments,
        add_checkpoint_arguments,
    ):
        add(parser)
    parser.seal_official()
    parser.add_argument("--ema_decay", type=float, default=0.9999, help="decay of the average")
    for add in (
        _add_process_arguments,
        add_formulation_arguments,
        add_timestep_arguments,
        add_curriculum_arguments,
        add_pacing_arguments,
        add_power_ema_arguments,
        _add_picture_arguments,
        add_evaluation_arguments,
        add_loop_arguments,
    ):
        add(parser)
    parser.set_defaults(
        output_dir="class-conditional-model",
        tracker_project_name="class-conditional",
        resolution=256,
        adam_weight_decay=0.0,
        timestep_sampler=None,
    )
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--model_config",
        help="network to train from scratch: DiT-S/2 ... DiT-XL/8, UNet, or a config file, folder "
        "or Hub repository of a DiTTransformer2DModel or UNet2DModel",
    )
    add("--pretrained_model_name_or_path", help="class-conditional pipeline to go on from")
    add("--revision", help="branch, tag or commit of that repository")
    add("--variant", help="variant of its weight files, such as fp16")


def _add_process_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("variance preserving process").add_argument
    add("--prediction_type", help="what the network predicts (default: the pipeline's, or epsilon)")
    add("--ddpm_num_steps", type=int, default=1000, help="number of noise levels")
    add(
        "--ddpm_beta_schedule",
        default="linear",
        help=f"course of the noise: {', '.join(BETA_SCHEDULES)}",
    )
    add("--snr_gamma", type=float, help="min-SNR loss weighting with this gamma; 5 is usual")


def _add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pictures").add_argument
    add("--no_pictures", action="store_true", help="draw none, neither on the way nor at the end")
    add(
        "--validation_classes",
        nargs="+",
        metavar="CLASS",
        help="numbers or names of the classes that are drawn (default: the first ten)",
    )
    add("--validation_images_per_class", type=int, default=8, help="pictures of each")
    add(
        "--guidance_scale",
        type=float,
        default=1.5,
        help="classifier-free guidance of pictures and of metrics",
    )
    add("--validation_inference_steps", type=int, default=50, help="denoising steps per picture")
    add("--validation_epochs", type=int, default=10, help="epochs between pictures")
    add(
        "--sampling_scheduler",
        metavar="CLASS",
        help="diffusers scheduler of pictures and pipeline (default: DDIMScheduler, "
        "FlowMatchEulerDiscreteScheduler or EDMEulerScheduler)",
    )
