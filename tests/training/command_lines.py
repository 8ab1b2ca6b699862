"""The command lines of the scripts, as functions."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora
from diffusers_curriculum.training.tasks.unconditional import Unconditional

build_parser = TextToImage.command_line.parser
build_lora_parser = TextToImageLora.command_line.parser
build_class_parser = ClassConditional.command_line.parser
build_unconditional_parser = Unconditional.command_line.parser


def parse_args(argv: Sequence[str] | None = None, *, machine: bool = True) -> Arguments:
    """Of text-to-image training; ``machine``: looks for files, packages and devices, too."""
    return TextToImage().parse(argv, machine=machine)


def parse_class_args(argv: Sequence[str] | None = None) -> Arguments:
    """Of class-conditional training."""
    return ClassConditional().parse(argv)


def parse_unconditional_args(argv: Sequence[str] | None = None) -> Arguments:
    """Of unconditional training."""
    return Unconditional().parse(argv)
