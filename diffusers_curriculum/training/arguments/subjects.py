"""Flags of data that is told by a prompt or a mask, named as in diffusers' DreamBooth scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_curriculum.training.arguments.buckets import BUCKETS
from diffusers_curriculum.training.arguments.flag import (
    BATCH,
    NOT_NEGATIVE,
    SHARE,
    Family,
    Need,
    choice,
    count,
    place,
    sharing,
    tracked,
)
from diffusers_curriculum.training.errors import UsageError

PRECISIONS = ("no", "fp32", "fp16", "bf16")

_PRESERVING = Need("--with_prior_preservation", lambda a: a.with_prior_preservation)
_MASKED = Need(
    "--mask_column or --mask_from_alpha", lambda a: a.mask_from_alpha or a.mask_column is not None
)


def _settle_subject(args: Any) -> None:
    """The folder of one subject's images is a folder of images."""
    if args.instance_data_dir is None:
        return
    if args.train_data_dir is not None:
        raise UsageError(
            f"--instance_data_dir {args.instance_data_dir} and --train_data_dir "
            f"{args.train_data_dir} both name the images: drop one of the two."
        )
    args.train_data_dir = args.instance_data_dir


def _check_prior(args: Any) -> None:
    """Refuse a prior without its images or prompt, and a folder that would mix both kinds."""
    if not args.with_prior_preservation:
        return
    missing = [name for name in ("class_data_dir", "class_prompt") if args[name] is None]
    if missing:
        raise UsageError(
            f"--with_prior_preservation needs --{' and --'.join(missing)}: the folder of class "
            "images, which are drawn as far as they are missing, and the prompt that tells them."
        )
    one = args.dataset_name or args.train_data_dir
    for named in [one] if one else [source.place for source in args.sources]:
        own, of_class = Path(named).resolve(), Path(args.class_data_dir).resolve()
        if own.is_relative_to(of_class) or of_class.is_relative_to(own):
            raise UsageError(
                f"--class_data_dir {args.class_data_dir} and {named}, the folder of the subject's "
                "images, lie in each other: one would be read as the other. Give two folders side "
                "by side."
            )


def _check_masks(args: Any) -> None:
    if args.mask_from_alpha and args.mask_column is not None:
        raise UsageError(
            f"--mask_column {args.mask_column} and --mask_from_alpha both tell the masks: drop one "
            "of the two."
        )


SUBJECT = Family.of(
    "data",
    place("instance_data_dir", help="folder of images of one subject; see --instance_prompt"),
    tracked(
        "instance_prompt",
        str,
        help="caption of every image, in the place of a column of captions",
        setting="dataset",
    ),
    settle=_settle_subject,
)
PRIOR = Family.of(
    "prior preservation",
    tracked(
        "with_prior_preservation",
        help="train on an image of the subject's class beside each image (arXiv 2208.12242)",
    ),
    *sharing(
        place("class_data_dir", help="folder of the class images; what it lacks is drawn into it"),
        tracked("class_prompt", str, help="their caption", setting="dataset"),
        count("num_class_images", 100, "how many there shall be"),
        tracked(
            "prior_loss_weight",
            float,
            1.0,
            "weight of their mean loss, which is added to that of the others",
            bound=NOT_NEGATIVE,
            setting="objective",
            later=True,
        ),
        choice(
            "prior_generation_precision",
            PRECISIONS,
            help="number format in which they are drawn (default, and no: fp16 on a GPU, else "
            "fp32)",
        ),
        count("sample_batch_size", 4, "images drawn at once", most=BATCH),
        needs=_PRESERVING,
    ),
    check=_check_prior,
)
MASKS = Family.of(
    "masks",
    tracked(
        "mask_column",
        str,
        help="column with the mask of each image: what is white there counts in the loss",
        later=True,
    ),
    tracked("mask_from_alpha", help="take the images' alpha for their masks", later=True),
    tracked(
        "unmasked_weight",
        float,
        0.0,
        "weight of what lies outside the mask",
        bound=SHARE,
        needs=(_MASKED,),
        later=True,
    ),
    setting="objective",
    check=_check_masks,
)
SUBJECTS = (SUBJECT, PRIOR, MASKS, BUCKETS)
