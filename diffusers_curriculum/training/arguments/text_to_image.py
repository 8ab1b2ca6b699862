"""The command line of train_text_to_image_curriculum.py: the official flags and ours.

Importing this module loads no model code, so that a wrong argument is told at once.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence

from diffusers_curriculum.training.arguments.checks import (
    DEPENDENCES,
    Dependence,
    check_arguments,
)
from diffusers_curriculum.training.arguments.key_values import parse_key_values
from diffusers_curriculum.training.arguments.official import add_official_arguments
from diffusers_curriculum.training.arguments.parser import OfficialFirstParser
from diffusers_curriculum.training.arguments.timesteps import (
    add_curriculum_arguments,
    add_pacing_arguments,
    add_timestep_arguments,
    resolve_bias,
)
from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

# Copies of names in modules that load more; a test keeps them equal.
BAD_SAMPLES = ("raise", "skip")
NONFINITE = ("raise", "skip")
SETTINGS = (
    *("seed", "global_batch", "dataset", "model", "schedule", "prediction_type", "sampler"),
    *("loss_weighting", "objective", "images", "optimizer", "ema"),
)

TEXT_TO_IMAGE_DEPENDENCES = (
    *DEPENDENCES,
    Dependence("dream_detail_preservation", "--dream_training", lambda a: a.dream_training),
    Dependence("validation_steps", "--validation_prompts", lambda a: bool(a.validation_prompts)),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check a command line (default: the program's own), before any model is loaded.

    ``timestep_sampler_args`` and ``loss_weighting_args`` come back as dicts, and ``--snr_gamma`` as
    the loss weighting that it stands for.

    Raises:
        UsageError: an argument is wrong, missing or without effect; the message says what to do.
        SystemExit: status 2 for what argparse itself refuses, with a message on stderr.
    """
    args = parse_checked(build_parser(), argv, TEXT_TO_IMAGE_DEPENDENCES)
    _resolve_non_ema_revision(args)
    return args


def parse_checked(
    parser: OfficialFirstParser,
    argv: Sequence[str] | None,
    dependences: Sequence[Dependence],
    settle: Callable[[argparse.Namespace], object] = lambda args: None,
) -> argparse.Namespace:
    """Parse and check a command line of any training script.

    Args:
        dependences: which arguments need others.
        settle: puts the script's own defaults, before anything is checked.

    Raises:
        UsageError, SystemExit: see :func:`parse_args`.
    """
    args = parser.parse_args(argv)
    settle(args)
    for name in ("timestep_sampler_args", "loss_weighting_args"):
        setattr(args, name, parse_key_values(f"--{name}", getattr(args, name) or ()))
    resolve_bias(args)
    check_arguments(args, parser.get_default, dependences)
    _resolve_snr_gamma(args)
    _resolve_local_rank(args)
    return args


def build_parser() -> OfficialFirstParser:
    """The parser: official flags first, so that their abbreviations win, then the new ones."""
    parser = OfficialFirstParser(
        description="Fine-tune Stable Diffusion with a timestep curriculum and importance sampling."
    )
    add_official_arguments(parser)
    parser.seal_official()
    add_timestep_arguments(parser)
    add_curriculum_arguments(parser)
    add_pacing_arguments(parser)
    add = parser.add_argument_group("further options").add_argument
    add("--caption_dropout", type=float, default=0.0, help="share of captions left empty")
    add("--ema_decay", type=float, default=0.9999, help="decay of the moving average")
    add_loop_arguments(parser)
    return parser


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    """What else the official scripts lack."""
    add = parser.add_argument_group("the run, further").add_argument
    add("--ema_interval", type=int, default=1, help="optimizer steps between its updates")
    add("--validation_steps", type=int, help="optimizer steps between validations")
    add("--log_every", type=int, default=10, help="optimizer steps between metrics")
    add(
        "--timestep_plot_steps",
        type=int,
        default=1000,
        help="optimizer steps between pictures of the effective density",
    )
    add(
        "--nonfinite",
        choices=NONFINITE,
        default="raise",
        help="a loss or gradient that is not finite: stop, or leave that update out",
    )
    add("--max_hours", type=float, help="save and stop before so many hours have passed")
    add(
        "--bad_samples",
        choices=BAD_SAMPLES,
        default="raise",
        help="unreadable images and missing captions: refuse, or leave out and list them",
    )
    add(
        "--bad_samples_limit",
        type=float,
        default=0.01,
        help="largest share of samples that --bad_samples skip may leave out",
    )
    add(
        "--allow_config_change",
        nargs="+",
        choices=SETTINGS,
        metavar="NAME",
        default=(),
        help=f"settings that may differ from the run to resume: {', '.join(SETTINGS)}",
    )
    add("--license", help="licence on the model card (default: that of the base model's card)")


def _resolve_snr_gamma(args: argparse.Namespace) -> None:
    # The official flag is one point of the larger family; nothing after this line treats it apart.
    if getattr(args, "snr_gamma", None) is not None:
        args.loss_weighting = "min_snr"
        args.loss_weighting_args = {**args.loss_weighting_args, "gamma": args.snr_gamma}


def _resolve_local_rank(args: argparse.Namespace) -> None:
    text = os.environ.get("LOCAL_RANK", "-1")
    try:
        rank = int(text)
    except ValueError:
        raise UsageError(
            f"the environment variable LOCAL_RANK is {text!r}: make it an integer or unset it."
        ) from None
    args.local_rank = args.local_rank if rank == -1 else rank


def _resolve_non_ema_revision(args: argparse.Namespace) -> None:
    if args.non_ema_revision is None:
        args.non_ema_revision = args.revision
    else:
        logger.warning("--non_ema_revision is deprecated: use --variant=non_ema instead.")
