"""Flags of low-rank adapters (LoRA, arXiv 2106.09685), named as peft's."""

from __future__ import annotations

from typing import Any

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.flag import (
    DECAY,
    POSITIVE,
    Family,
    choice,
    count,
    place,
    sharing,
    tracked,
)
from diffusers_curriculum.training.errors import UsageError

# Those of peft that leave the weights of the base as they are: an adapter is loaded onto a base
# that nobody has changed.
INITIAL_WEIGHTS = ("gaussian", "kaiming", "orthogonal")
SAVE_FORMATS = ("diffusers", "kohya")
QUANTIZATIONS = (*environment.BY_BITSANDBYTES, "int8wo", "float8wo")  # of the frozen base


def _check_machine(args: Any) -> None:
    environment.check_peft(args)
    environment.check_quantized(args)


def _settle(args: Any) -> None:
    if args.lora_alpha is None:
        args.lora_alpha = float(args.rank)


def _check(args: Any) -> None:
    path = args.bnb_quantization_config_path
    if path is not None and args.quantize_base is not None:
        raise UsageError(
            f"--quantize_base {args.quantize_base} and --bnb_quantization_config_path {path} both "
            "say in how many bits the base is kept: drop one of the two."
        )
    if args.use_dora and args.save_format == "kohya":
        raise UsageError(
            "--use_dora with --save_format kohya: diffusers reads no lengths of rows from kohya's "
            "names, and the weights would draw other pictures; use --save_format diffusers."
        )


LORA = Family.of(
    "adapter",
    *sharing(
        count("rank", 4, "rank of the update matrices", most=2**16),
        tracked(
            "lora_alpha",
            float,
            help="updates are multiplied by alpha / rank (default: the rank)",
            bound=POSITIVE,
        ),
        tracked("lora_dropout", float, 0.0, "dropout before the update matrices", bound=DECAY),
        tracked(
            "lora_target_modules",
            str,
            help="modules of the network that get an update, by the ends of their names (default: "
            "queries, keys, values and outputs of attention)",
            nargs="+",
            metavar="MODULE",
        ),
        tracked(
            "use_dora", help="learn the length of each weight row by itself (arXiv 2402.09353)"
        ),
        tracked("use_rslora", help="multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)"),
        setting="adapter",
    ),
    choice(
        "init_lora_weights",
        INITIAL_WEIGHTS,
        "gaussian",
        "first weights, whose update is zero: gaussian as in diffusers' scripts, kaiming as is "
        "peft's default",
    ),
    choice(
        "save_format",
        SAVE_FORMATS,
        "diffusers",
        "names of the saved weights: diffusers', or those of kohya's trainer, which other programs "
        "read; diffusers loads both",
    ),
    choice(
        "quantize_base",
        QUANTIZATIONS,
        help="bits of the frozen network's linear layers: 4bit (NF4) and 8bit by bitsandbytes on a "
        "GPU, int8wo and float8wo (weights only) by torchao; the adapter stays float32, and loads "
        "onto the base in full",
        setting="model",
    ),
    place(
        "bnb_quantization_config_path",
        help="JSON file of diffusers' BitsAndBytesConfig, in the place of --quantize_base",
        setting="model",
    ),
    settle=_settle,
    check=_check,
    check_machine=_check_machine,
)


def _check_text_encoders(args: Any) -> None:
    if args.use_dora and args.train_text_encoder:
        raise UsageError(
            "--use_dora with --train_text_encoder: diffusers reads no lengths of rows of text "
            "encoders, and the weights would draw other pictures; leave one of the two out."
        )


TEXT_ENCODERS = Family.of(
    "adapter",
    tracked("train_text_encoder", help="train an adapter in each text encoder, too"),
    setting="adapter",
    check=_check_text_encoders,
)
