"""Flags of flow-matching transformers, named as in diffusers' scripts for SD3, Flux and kin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from diffusers_curriculum.training.arguments.adapters import LORA
from diffusers_curriculum.training.arguments.flag import (
    FROM_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    Bound,
    Family,
    Need,
    choice,
    count,
    sharing,
    tracked,
)
from diffusers_curriculum.training.arguments.noise_levels import FLOW_SHIFT
from diffusers_curriculum.training.errors import UsageError

LAWS = ("logit_normal", "mode")  # schemes that say what is drawn
WEIGHTS = ("sigma_sqrt", "cosmap")  # and what losses weigh
SCHEMES = (WEIGHTS[0], *LAWS, WEIGHTS[1], "none")


def _settle(args: Any) -> None:
    """Turn a scheme that is a law into the density that it stands for, drawn without a floor; a
    task puts the weights of the others."""
    scheme = args.weighting_scheme
    kind = "timestep_sampler" if scheme in LAWS else "loss_weighting"
    if scheme == "none":
        return
    other = next((flag for flag in (kind, f"{kind}_args") if flag in args.given), None)
    if other is not None or args[kind] not in ("uniform", "none"):
        raise UsageError(
            f"--weighting_scheme {scheme} and --{other or kind} {args[other or kind]} both say "
            f"{'what is drawn' if scheme in LAWS else 'what losses weigh'}: drop one of the two."
        )
    setattr(args, kind, f"scheme_{scheme}" if scheme in LAWS else scheme)
    if scheme not in LAWS:
        return
    args.timestep_sampler_args = (
        {"mean": args.logit_mean, "std": args.logit_std}
        if scheme == "logit_normal"
        else {"scale": args.mode_scale}
    )
    if args.timestep_floor is None:
        args.timestep_floor = 0.0


_NORMAL = Need("--weighting_scheme logit_normal", lambda a: a.weighting_scheme == "logit_normal")
_MODE = Need("--weighting_scheme mode", lambda a: a.weighting_scheme == "mode")
_FINITE = Bound("finite", math.isfinite)

SCHEME = Family.of(
    "timesteps",
    choice(
        "weighting_scheme",
        SCHEMES,
        "none",
        "logit_normal, mode: the law that timesteps are drawn from; sigma_sqrt, cosmap: the weight "
        "of their losses; short for a --timestep_sampler or --loss_weighting",
    ),
    *sharing(
        tracked(
            "logit_mean", float, 0.0, "mean of the logit; above 0 favours clean", bound=_FINITE
        ),
        tracked("logit_std", float, 1.0, "its standard deviation", bound=POSITIVE),
        needs=_NORMAL,
    ),
    tracked(
        "mode_scale",
        float,
        1.29,
        "how far the mode stands out",
        bound=Bound("from -1 to 1.7519", lambda x: -1 <= x <= 2 / (math.pi - 2)),
        needs=(_MODE,),
    ),
    settle=_settle,
)
FLOW = Family.of(
    "objective",
    FLOW_SHIFT,
    tracked(
        "precondition_outputs",
        int,
        0,
        "1: compare x0 and not velocities, which weighs losses by sigma^2",
        bound=Bound("0 or 1", lambda x: x in (0, 1)),
        setting="objective",
    ),
    tracked(
        "guidance_scale",
        float,
        3.5,
        "guidance that a distilled network is told in training",
        bound=NOT_NEGATIVE,
        setting="objective",
    ),
    setting="schedule",
)
TEXT = Family.of(
    "captions",
    count(
        "max_sequence_length",
        help="tokens of a caption for the language model (default: 77 for SD3, 512 for the others)",
        most=2**16,
    ),
    tracked(
        "text_encoder_out_layers",
        int,
        help="hidden states of the language model that Flux.2 is told (default: as its pipeline "
        "reads, 9 18 27)",
        nargs="+",
        metavar="LAYER",
        bound=FROM_ZERO,
        most=2**16,
    ),
    setting="images",
)


def _settle_adapter(args: Any) -> None:
    if args.lora_layers is not None:
        if args.lora_target_modules:
            raise UsageError(
                f"--lora_layers {args.lora_layers} and --lora_target_modules "
                f"{' '.join(args.lora_target_modules)} both name modules: drop one of the two."
            )
        args.lora_target_modules = [name.strip() for name in args.lora_layers.split(",")]
    if LORA.settle is not None:
        LORA.settle(args)


def _check_adapter_machine(args: Any) -> None:
    if args.use_lora and LORA.check_machine is not None:
        LORA.check_machine(args)


_ADAPTED = Need("--use_lora", lambda a: a.use_lora)
ADAPTER = replace(
    LORA,
    flags=(
        tracked("use_lora", help="train an adapter (LoRA) and not the whole transformer"),
        *sharing(
            *LORA.flags,
            tracked(
                "lora_layers",
                str,
                help="--lora_target_modules in one word, with commas",
                setting="adapter",
            ),
            needs=_ADAPTED,
        ),
    ),
    settle=_settle_adapter,
    check_machine=_check_adapter_machine,
)
