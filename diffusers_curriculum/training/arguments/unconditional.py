"""The command line of train_unconditional_curriculum.py: the official train_unconditional.py's
flags, and ours.

Importing this module loads no model code.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from diffusers_curriculum.training.arguments.checks import DEPENDENCES, Dependence
from diffusers_curriculum.training.arguments.evaluation import add_evaluation_arguments
from diffusers_curriculum.training.arguments.images import (
    IMAGE_DEPENDENCES,
    add_formulation_arguments,
    add_network_arguments,
    add_power_ema_arguments,
    check_image_arguments,
    check_network_name,
    settle_formulation,
)
from diffusers_curriculum.training.arguments.official import IMAGE_INTERPOLATION_MODES
from diffusers_curriculum.training.arguments.official_unconditional import (
    add_official_unconditional,
)
from diffusers_curriculum.training.arguments.parser import OfficialFirstParser
from diffusers_curriculum.training.arguments.text_to_image import add_loop_arguments, parse_checked
from diffusers_curriculum.training.arguments.timesteps import (
    add_curriculum_arguments,
    add_pacing_arguments,
    add_timestep_arguments,
)
from diffusers_curriculum.training.errors import UsageError

UNCONDITIONAL_DEPENDENCES = (
    *DEPENDENCES,
    *IMAGE_DEPENDENCES,
    Dependence("ema_inv_gamma ema_power ema_max_decay", "--use_ema", lambda a: a.use_ema),
    Dependence(
        "revision variant",
        "--pretrained_model_name_or_path",
        lambda a: a.pretrained_model_name_or_path is not None,
    ),
    Dependence(
        "eval_batch_size ddpm_num_inference_steps save_images_epochs validation_steps",
        "pictures (drop --no_pictures)",
        lambda a: not a.no_pictures,
    ),
    Dependence("hub_private_repo", "--push_to_hub", lambda a: a.push_to_hub),
)


def parse_unconditional_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check a command line (default: the program's own), before any model is loaded.

    The official names also appear under the names of the other scripts: ``num_train_epochs`` for
    --num_epochs, ``report_to`` for --logger, ``ema_decay`` for --ema_max_decay.

    Raises:
        UsageError: an argument is wrong, missing or without effect; the message says what to do.
        SystemExit: status 2 for what argparse itself refuses, with a message on stderr.
    """
    parser = build_unconditional_parser()
    args = parse_checked(parser, argv, UNCONDITIONAL_DEPENDENCES, _settle)
    check_image_arguments(args)
    check_network_name("model_config_name_or_path", args.model_config_name_or_path)
    _settle_prediction(args, parser.get_default("prediction_type"))
    args.num_train_epochs = args.num_epochs
    _settle_denoising(args, parser)
    given, config = args.pretrained_model_name_or_path, args.model_config_name_or_path
    if given is not None and config is not None:
        raise UsageError(
            f"--model_config_name_or_path {config} and --pretrained_model_name_or_path {given} "
            "both say which network: drop one of the two."
        )
    return args


def build_unconditional_parser() -> OfficialFirstParser:
    """The parser: official flags first, so that their abbreviations win, then the new ones."""
    parser = OfficialFirstParser(
        description="Train an unconditional diffusion or flow model with a curriculum over noise "
        "levels and importance sampling."
    )
    add_official_unconditional(parser)
    parser.seal_official()
    for add in (
        _add_further_arguments,
        add_network_arguments,
        add_formulation_arguments,
        add_timestep_arguments,
        add_curriculum_arguments,
        add_pacing_arguments,
        add_power_ema_arguments,
        add_evaluation_arguments,
        add_loop_arguments,
    ):
        add(parser)
    parser.set_defaults(timestep_sampler=None)
    return parser


def _add_further_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("further options").add_argument
    add("--pretrained_model_name_or_path", help="unconditional pipeline to go on from")
    add("--revision", help="branch, tag or commit of that repository")
    add("--variant", help="variant of its weight files, such as fp16")
    add("--image_column", default="image", help="column with the images")
    add("--max_train_samples", type=int, help="train on that many samples only, chosen by the seed")
    add("--max_train_steps", type=int, help="optimizer steps in all; overrides --num_epochs")
    add("--seed", type=int, help="seed of every random draw")
    add("--scale_lr", action="store_true", help="multiply the rate by the global batch size")
    add("--max_grad_norm", type=float, default=1.0, help="longer gradients are cut to this norm")
    add("--use_8bit_adam", action="store_true", help="keep AdamW's state in 8 bits (bitsandbytes)")
    add("--gradient_checkpointing", action="store_true", help="save memory: recompute activations")
    add("--allow_tf32", action="store_true", help="multiply float32 matrices in TF32")
    add("--offload_ema", action="store_true", help="keep the average in host memory")
    add("--foreach_ema", action="store_true", help="update the average with fused operations")
    add("--snr_gamma", type=float, help="min-SNR loss weighting with this gamma; 5 is usual")
    add("--tracker_project_name", default="unconditional", help="project name at the tracker")
    add("--no_pictures", action="store_true", help="draw none, neither on the way nor at the end")
    add(
        "--image_interpolation_mode",
        default="bilinear",
        choices=IMAGE_INTERPOLATION_MODES,
        help="filter used to resize images",
    )
    add(
        "--sampling_scheduler",
        metavar="CLASS",
        help="diffusers scheduler of pictures and pipeline (default: DDPMScheduler, "
        "FlowMatchEulerDiscreteScheduler or EDMEulerScheduler)",
    )


def _settle_prediction(args: argparse.Namespace, default: str) -> None:
    """The official default is meant for a new DDPM; a pipeline, a flow and EDM have their own. The
    official script weighs the loss of x0 by the SNR, which makes it that of the noise."""
    own = args.formulation != "ddpm" or args.pretrained_model_name_or_path is not None
    if own and args.prediction_type == default:
        args.prediction_type = None
    if args.prediction_type == "sample" and args.loss_weighting == "none":
        args.loss_weighting = "unit_epsilon"


def _settle_denoising(args: argparse.Namespace, parser: OfficialFirstParser) -> None:
    """1,000 steps are meant for DDPM; a flow and EDM need few. Metrics of DDPM need as many as its
    pictures, which another sampler would not."""
    drawn, measured = "ddpm_num_inference_steps", "eval_num_inference_steps"
    if args.formulation != "ddpm" and getattr(args, drawn) == parser.get_default(drawn):
        setattr(args, drawn, parser.get_default(measured))
    ancestral = args.formulation == "ddpm" and args.sampling_scheduler is None
    if ancestral and getattr(args, measured) == parser.get_default(measured):
        setattr(args, measured, getattr(args, drawn))


def _settle(args: argparse.Namespace) -> None:
    args.report_to = args.logger
    args.ema_decay = args.ema_max_decay if args.use_ema else None
    args.validation_epochs = args.save_images_epochs
    settle_formulation(args)
