"""Flags of the validation loss: wrong uses are refused, and what disturbs samples is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.validation import undisturbed
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.flow import FlowTransformer
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora
from diffusers_curriculum.training.tasks.text_to_image_sdxl import TextToImageSDXL
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from tests.training.command_lines import parse_args

BASE = "--pretrained_model_name_or_path some/model --dataset_name some/data "
# Command line -> what the message must say: the value, then the remedy.
WRONG = {
    "--validation_split 0": ("--validation_split is 0", "such as 0.05"),
    "--validation_split 1.5": ("--validation_split is 1.5", "or the name of a split"),
    "--validation_split nan": ("--validation_split is nan", "above 0 and below 1"),
    "--validation_split train": ("--validation_split train is what is trained on", "0.05"),
    "--validation_split a --train_split a": ("--validation_split a", "another split"),
    "--validation_split 0.1 --validation_data_dir x": ("0.1 and --validation_data_dir x", "drop"),
    "--validation_data_dir /nowhere": ("/nowhere", "no such folder"),
    "--validation_loss_samples 5": ("is 5", "no effect without --validation_split"),
    "--validation_loss_quantiles 5": ("is 5", "no effect without --validation_split"),
    "--validation_loss_steps 5": ("is 5", "no effect without --validation_split"),
    "--validation_clip_score x/y": ("x/y", "no effect without --validation_prompts"),
    "--validation_prompts a --validation_clip_score /nowhere": ("/nowhere", "no such folder"),
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_uses(line: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_args((BASE + line).split())
    for part in WRONG[line]:
        assert part in str(caught.value)


@pytest.mark.parametrize(("given", "trained_on"), [("0.1", None), ("test", "train")])
def test_beside_a_named_split_train_is_trained_on(given: str, trained_on: str | None) -> None:
    assert parse_args([*BASE.split(), "--validation_split", given]).train_split == trained_on


# What is the same in validation as in training, of all that says how samples and noise are made.
KEPT = {
    *("resolution", "image_interpolation_mode", "background", "preserve_input_precision"),
    *("cache_latents", "latent_crops"),  # held-out images are encoded as they come
    *("max_sequence_length", "text_encoder_out_layers", "guidance_scale"),
    *("dream_detail_preservation", "precondition_outputs", "learned_variance"),  # of the loss
    "adaptive_loss_power",
    *("unmasked_weight", "prior_loss_weight", "with_prior_preservation"),
}


TASKS = (TextToImage, TextToImageLora, TextToImageSDXL, FlowTransformer, ClassConditional)


@pytest.mark.parametrize("task", [*TASKS, Unconditional])
def test_whatever_disturbs_samples_is_left_out(task: Callable[[], object]) -> None:
    """A flag that is added is either left out, or kept on purpose."""
    line: CommandLine = task.command_line  # pyright: ignore[reportFunctionMemberAccess]
    args = line.parser().parse_args([*BASE.split()] if task is not Unconditional else [])
    makes_samples = [f.dest for f in line.flags if f.setting in ("images", "objective")]
    disturbing = [name for name in makes_samples if name not in KEPT]
    marker = object()
    for name in disturbing:
        setattr(args, name, marker)
    plain = undisturbed(args)
    assert len(disturbing) >= 3
    assert [name for name in disturbing if getattr(plain, name) is marker] == []
    assert all(getattr(args, name) is marker for name in disturbing)  # those of the run stay
