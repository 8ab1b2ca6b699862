"""Flags of samples that are kept apart from the training, and of the loss on them."""

from __future__ import annotations

import copy
from typing import Any

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.flag import LEVELS, Family, Need, count, place, tracked
from diffusers_curriculum.training.errors import UsageError

KEPT_APART = Need(
    "--validation_split or --validation_data_dir",
    lambda a: a.validation_split is not None or a.validation_data_dir is not None,
)
# What training adds to samples, to what the network is told, and to noise; arguments without it.
_UNDISTURBED = {
    "center_crop": True,
    "random_flip": False,
    "caption_dropout": 0.0,
    "label_dropout": 0.0,
    "noise_offset": 0.0,
    "input_perturbation": 0.0,
    "dream_training": False,
    "mixflow_gamma": None,
    "mask_column": None,
    "mask_from_alpha": False,
}


def held_out_share(split: str | None) -> float | None:
    """The share that a --validation_split is; None for the name of a split."""
    try:
        return None if split is None else float(split)
    except ValueError:
        return None


def undisturbed(args: Any) -> Any:
    """The arguments of the same run without augmentation, dropout of conditions, and noise of
    other kinds: those with which runs can be compared."""
    changed = copy.copy(args)
    for name in _UNDISTURBED.keys() & vars(args).keys():
        setattr(changed, name, _UNDISTURBED[name])
    return changed


def _settle(args: Any) -> None:
    """Beside a split that is kept apart, train is trained on, and not the whole folder."""
    named = args.validation_split is not None and held_out_share(args.validation_split) is None
    if named and args.train_split is None:
        args.train_split = "train"


def _check(args: Any) -> None:
    split, folder = args.validation_split, args.validation_data_dir
    if split is not None and folder is not None:
        raise UsageError(
            f"--validation_split {split} and --validation_data_dir {folder} both name the samples "
            "that are kept apart: drop one of the two."
        )
    share = held_out_share(split)
    if share is not None and not 0 < share < 1:
        raise UsageError(
            f"--validation_split is {split}: give a share of the samples above 0 and below 1, such "
            "as 0.05, or the name of a split."
        )
    if split is not None and split == args.train_split:
        raise UsageError(
            f"--validation_split {split} is what is trained on: give another split, or a share of "
            "it such as 0.05."
        )


def _check_machine(args: Any) -> None:
    folder = args.validation_data_dir
    if folder is not None:
        environment.check_image_folder("--validation_data_dir", folder, "a folder of images")


HELD_OUT = Family.of(
    "validation",
    tracked(
        "validation_split",
        str,
        help="samples that are kept apart: a share of the data, such as 0.05, the same for every "
        "seed, or the name of a split (--train_split is train then)",
        metavar="SHARE|NAME",
    ),
    place("validation_data_dir", help="folder of images kept apart, like --train_data_dir"),
    settle=_settle,
    check=_check,
    check_machine=_check_machine,
)
VALIDATION_LOSS = Family.of(
    "validation",
    count(
        "validation_loss_steps",
        help="optimizer steps between losses on the samples that are kept apart, which are also "
        "computed before the first step and at the end (default: --checkpointing_steps)",
    ),
    count("validation_loss_samples", 128, "how many of them, at most", most=10_000_000),
    count(
        "validation_loss_quantiles",
        8,
        "noise levels of each, at the middles of so many equal parts of the schedule",
        most=LEVELS,
    ),
    needs=KEPT_APART,
)
