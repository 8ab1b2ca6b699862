"""The command line of train_vit_vqgan.py, and what a resumed run may not change unnoticed."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from diffusers_curriculum.models.vit_vq import VIT_VQ_SIZES, ViTVQModel, vit_vq_config
from diffusers_curriculum.training.arguments import official
from diffusers_curriculum.training.arguments.checks import BOUNDS, LR_SCHEDULERS, Bound
from diffusers_curriculum.training.arguments.key_values import parse_key_values
from diffusers_curriculum.training.arguments.parser import OfficialFirstParser
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process.environment import TRACKERS, installed
from diffusers_curriculum.training.storage.fingerprints import dataset_digest

OWN_BOUNDS = (
    Bound("at least 1", lambda x: x >= 1, "r1_interval discriminator_width measure_samples"),
    Bound(
        "finite and not negative",
        lambda x: 0 <= x < math.inf,
        "l2_weight logit_laplace_weight perceptual_weight adversarial_weight discriminator_start "
        "discriminator_learning_rate r1_gamma codebook_patience",
    ),
)
_IMAGES = "resolution center_crop random_flip image_interpolation_mode"
_OPTIMIZER = (
    "learning_rate scale_lr lr_scheduler lr_warmup_steps use_8bit_adam adam_beta1 adam_beta2 "
    "adam_weight_decay adam_epsilon max_grad_norm discriminator_learning_rate"
)
_OBJECTIVE = (
    "l2_weight logit_laplace_weight perceptual_weight perceptual_model adversarial_weight "
    "discriminator_start discriminator_width r1_gamma r1_interval codebook_patience"
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check a command line; ``model_config`` comes back as arguments of ViTVQModel.

    Raises:
        UsageError: an argument is wrong, missing or without effect; the message says what to do.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    for bound in (*BOUNDS, *OWN_BOUNDS):
        for name in bound.names.split():
            value = getattr(args, name, None)
            if value is not None and not bound.holds(value):
                raise UsageError(f"--{name} is {value}: it must be {bound.wanted}.")
    args.model_config = _model_config(args)
    _check(args, parser)
    return args


def build_parser() -> OfficialFirstParser:
    """The parser: flags that diffusers' scripts have, by their names, then the new ones."""
    parser = OfficialFirstParser(description="Train ViT-VQGAN (arXiv 2110.04627) on images.")
    _add_data_arguments(parser)
    official.add_run_arguments(parser)
    official.add_optimizer_arguments(parser)
    _add_precision_arguments(parser)
    _add_output_arguments(parser)
    official.add_checkpoint_arguments(parser)
    parser.seal_official()
    _add_model_arguments(parser)
    _add_loss_arguments(parser)
    _add_loop_arguments(parser)
    # no average is kept: what explains a lack of memory asks for these
    parser.set_defaults(use_ema=False, offload_ema=False, resolution=256)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    official.add_source_arguments(group)
    group.add_argument(
        "--validation_data_dir", help="folder of images kept apart, for PSNR and pictures"
    )
    official.add_image_arguments(group)


def _add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("precision").add_argument
    kinds = ["no", "fp16", "bf16"]
    add("--mixed_precision", choices=kinds, help="number format of the autoencoder's forward pass")
    add("--allow_tf32", action="store_true", help="multiply float32 matrices in TF32")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="vit-vqgan", help="folder of all results")
    add("--logging_dir", default="logs", help="folder of tracker files, in --output_dir")
    add("--report_to", default="tensorboard", help="tracker, or all")
    add("--tracker_project_name", default="vit-vqgan", help="project name at the tracker")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="ViTVQModel to go on from: folder or Hub id")
    sizes = ", ".join(VIT_VQ_SIZES)
    add("--model_config", help=f"{sizes}, or a JSON file with ViTVQModel's arguments")
    add("--model_args", nargs="+", metavar="KEY=VALUE", help="changes to --model_config")


def _add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("losses").add_argument
    add("--l2_weight", type=float, default=1.0, help="weight of the squared error")
    add("--logit_laplace_weight", type=float, default=0.0, help="weight of the logit-Laplace loss")
    add("--perceptual_model", help="vision model of transformers whose features are compared")
    add("--perceptual_weight", type=float, default=0.1, help="weight of their distance")
    add("--adversarial_weight", type=float, default=0.1, help="weight of the critic; 0: none")
    add("--discriminator_start", type=int, default=0, help="first step with the critic")
    add("--discriminator_width", type=int, default=64, help="its channels at full resolution")
    add("--discriminator_learning_rate", type=float, help="default: --learning_rate")
    add("--r1_gamma", type=float, default=10.0, help="weight of the critic's gradient penalty")
    add("--r1_interval", type=int, default=16, help="steps between penalties")
    add(
        "--codebook_patience",
        type=int,
        default=100,
        help="steps after which an unused code is revived; 0: never",
    )


def _add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("further options").add_argument
    add("--log_every", type=int, default=10, help="steps between metrics")
    add("--validation_steps", type=int, help="steps between validations (default: at the end)")
    add("--measure_samples", type=int, default=10_000, help="images that the latents' scale is of")
    add(
        "--latent_scale",
        choices=("rms", "std"),
        default="rms",
        help="which of the two scaling_factor makes 1; they differ where the mean is not 0",
    )
    add("--nonfinite", choices=("raise", "skip"), default="raise", help="what a NaN in a step does")
    add("--max_hours", type=float, help="save and stop before so many hours have passed")
    policies = ("raise", "skip")
    add("--bad_samples", choices=policies, default="raise", help="what unreadable images do")
    add("--bad_samples_limit", type=float, default=0.01, help="share that skip may leave out")
    add(
        "--allow_config_change",
        nargs="+",
        choices=SETTINGS,
        metavar="NAME",
        default=(),
        help=f"settings that may differ from the run to resume: {', '.join(SETTINGS)}",
    )


SETTINGS = ("seed", "global_batch", "dataset", "model", "objective", "images", "optimizer")


def _model_config(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the model to build; those of a pretrained one are read with it."""
    changes = parse_key_values("--model_args", args.model_args or ())
    known = set(inspect.signature(ViTVQModel.__init__).parameters) - {"self"}
    name = args.model_config
    if args.pretrained_model_name_or_path is not None:
        if name is not None or changes:
            raise UsageError(
                "--pretrained_model_name_or_path brings its own config: drop --model_config and "
                "--model_args."
            )
        return {}
    if name is None or name in VIT_VQ_SIZES:
        config = vit_vq_config(name or "small", args.resolution) | changes
    else:
        config = {"image_size": args.resolution} | _read_config(name, known) | changes
    unknown = sorted(config.keys() - known)
    if unknown:
        raise UsageError(f"the model has no argument {unknown[0]!r}; it has {', '.join(known)}.")
    return config


def _read_config(name: str, known: set[str]) -> dict[str, Any]:
    try:
        config = json.loads(Path(name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--model_config is {name!r}: it is none of {', '.join(VIT_VQ_SIZES)} and cannot be "
            f"read as JSON ({error})."
        ) from error
    if not isinstance(config, dict):
        raise UsageError(f"--model_config {name!r} must hold a JSON object.")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.lr_scheduler not in LR_SCHEDULERS:
        raise UsageError(
            f"--lr_scheduler is {args.lr_scheduler!r}: choose from {', '.join(LR_SCHEDULERS)}."
        )
    if args.dataset_name is None and args.train_data_dir is None:
        raise UsageError("there are no images: pass --dataset_name or --train_data_dir.")
    if args.report_to != "all" and not any(map(installed, TRACKERS.get(args.report_to, ()))):
        raise UsageError(
            f"--report_to is {args.report_to!r}: choose an installed one of {', '.join(TRACKERS)}."
        )
    if args.use_8bit_adam and not installed("bitsandbytes"):
        raise UsageError("--use_8bit_adam needs bitsandbytes: pip install it, or drop the flag.")
    if args.validation_steps is not None and args.validation_data_dir is None:
        raise UsageError("--validation_steps needs --validation_data_dir.")
    if args.validation_data_dir is not None and not os.path.isdir(args.validation_data_dir):
        raise UsageError(f"--validation_data_dir {args.validation_data_dir!r} is not a folder.")
    needs = {
        "perceptual_weight": (args.perceptual_model, "--perceptual_model"),
        "discriminator_start": (args.adversarial_weight, "an --adversarial_weight above 0"),
        "discriminator_learning_rate": (args.adversarial_weight, "an --adversarial_weight above 0"),
    }
    for name, (holds, wanted) in needs.items():
        if not holds and getattr(args, name) != parser.get_default(name):
            raise UsageError(f"--{name} does nothing without {wanted}.")
    if not (args.l2_weight or args.logit_laplace_weight or args.perceptual_model):
        raise UsageError("nothing is reconstructed: give --l2_weight or --logit_laplace_weight.")


def run_facts(
    args: argparse.Namespace, plan: BatchPlan, rows: Dataset, model: dict[str, Any]
) -> dict[str, Any]:
    """What goes into run.json and the manifest of every checkpoint, as plain data."""
    source = args.train_data_dir if args.dataset_name is None else args.dataset_name
    folder = source if os.path.isdir(source) else None
    facts: dict[str, Any] = {
        "seed": plan.seed,
        "global_batch": plan.total,
        "world_size": plan.world_size,
        "num_samples": plan.num_samples,
        "dataset": {
            "name": None if folder else source,
            "config": args.dataset_config_name,
            "sha256": dataset_digest(rows, args.image_column, None, folder),
        },
        # the scale is measured at the end, and the rest tells versions and folders
        "model": {k: v for k, v in model.items() if k[0] != "_" and k != "scaling_factor"},
    }
    groups = {"objective": _OBJECTIVE, "images": _IMAGES, "optimizer": _OPTIMIZER}
    for setting, names in groups.items():
        facts[setting] = {name: getattr(args, name) for name in names.split()}
    return json.loads(json.dumps(facts))
