"""Flags of subjects, class images and masks: what is refused, and what a resumed run is told."""

from __future__ import annotations

import pytest

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.tasks.text_to_image import TextToImage

BASE = "--pretrained_model_name_or_path base"
PRIOR = "--with_prior_preservation --class_prompt dog --class_data_dir data/dogs"


def parsed(line: str) -> Arguments:
    return TextToImage.command_line.parse(f"{BASE} {line}".split(), machine=False)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--train_data_dir a --instance_data_dir b", "both name the images: drop one of the two"),
        ("--instance_prompt dog --caption_column c", "no effect without captions in the data"),
        ("--train_data_dir a --class_prompt dog", "no effect without --with_prior_preservation"),
        ("--with_prior_preservation --class_prompt dog", "needs --class_data_dir: the folder"),
        ("--with_prior_preservation", "needs --class_data_dir and --class_prompt"),
        (f"{PRIOR} --train_data_dir data", "data/dogs and data, .* lie in each other"),
        (f"{PRIOR} --train_data_dir data/dogs", "lie in each other"),
        (f"{PRIOR} --instance_data_dir data/dogs/mine", "lie in each other"),
        (f"{PRIOR} --train_data_dir a --prior_loss_weight -1", "must be finite and not negative"),
        (f"{PRIOR} --train_data_dir a --num_class_images 0", "must be at least 1"),
        ("--mask_column m --mask_from_alpha", "both tell the masks: drop one of the two"),
        ("--unmasked_weight 0.5", "no effect without --mask_column or --mask_from_alpha"),
        ("--mask_from_alpha --unmasked_weight 2", r"must be in \[0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(line: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parsed(line)


def test_only_what_does_something_is_a_fact() -> None:
    plain = parsed("--train_data_dir a").of_setting("objective")
    assert not {name for name in plain if "mask" in name or "prior" in name}
    told = parsed(f"{PRIOR} --train_data_dir data/mine").of_setting("objective")
    assert told == plain | {"prior_loss_weight": 1.0}
    told = parsed("--train_data_dir a --mask_from_alpha").of_setting("objective")
    assert told == plain | {"mask_from_alpha": True, "unmasked_weight": 0.0}
