"""Flags that class-conditional and unconditional training share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.flag import (
    LEVELS,
    NOT_NEGATIVE,
    SHARE,
    Bound,
    Family,
    Flag,
    Need,
    at_least,
    choice,
    count,
    pairs,
    place,
    sharing,
    tracked,
)
from diffusers_curriculum.training.arguments.noise_levels import FLOW_SHIFT
from diffusers_curriculum.training.arguments.run import FILE_DTYPES
from diffusers_curriculum.training.errors import UsageError

FORMULATIONS = ("ddpm", "flow", "edm", "mean_flow")
LEARNED_VARIANCES = ("none", "vlb", "ignore")
# diffusers' schedules that need no table.
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")

DDPM = Need("--formulation ddpm", lambda a: a.formulation == "ddpm")
PRETRAINED = Need(
    "--pretrained_model_name_or_path", lambda a: a.pretrained_model_name_or_path is not None
)
PICTURES = Need("pictures (drop --no_pictures)", lambda a: not a.no_pictures)
_FLOW = Need("--formulation flow or mean_flow", lambda a: a.formulation in ("flow", "mean_flow"))
_MEAN_FLOW = Need("--formulation mean_flow", lambda a: a.formulation == "mean_flow")
_SIGMA = Bound("from 1e-9 to 1e9", lambda x: 1e-9 <= x <= 1e9)  # squares are sound in float32
_EDM = Need("--formulation edm", lambda a: a.formulation == "edm")
_CONTINUOUS = Need(
    "--formulation flow, mean_flow or edm, which are drawn continuously otherwise",
    lambda a: a.formulation in ("flow", "mean_flow", "edm"),
)
AUTOENCODED = Need(
    "--pretrained_vae_model_name_or_path or the autoencoder of a pretrained pipeline",
    lambda a: bool(a.pretrained_vae_model_name_or_path or a.pretrained_model_name_or_path),
)
_POWER = Need("--power_ema", lambda a: bool(a.power_ema))

AUTOENCODER = Family.of(
    "autoencoder",
    place(
        "pretrained_vae_model_name_or_path",
        help="autoencoder (AutoencoderKL, VQModel or ViTVQModel) whose latents are trained on: a "
        "repository on the Hub or a folder (default: the pipeline's own, else pixels)",
        setting="model",
    ),
    check_machine=lambda args: environment.check_folder(
        args, "pretrained_vae_model_name_or_path", "a saved autoencoder"
    ),
)


def _check_formulation(args: Any) -> None:
    if args.learned_variance == "vlb" and args.formulation != "ddpm":
        raise UsageError(
            f"--learned_variance vlb with --formulation {args.formulation}: the variational term "
            "is that of a variance preserving process; use --formulation ddpm, or "
            "--learned_variance ignore."
        )
    if not args.sigma_min < args.sigma_max:
        raise UsageError(
            f"--sigma_min is {args.sigma_min} and --sigma_max {args.sigma_max}: the first must be "
            "the smaller."
        )
    if args.formulation == "mean_flow":
        _check_mean_flow(args)


def _check_mean_flow(args: Any) -> None:
    """Refuse what its derivative, or its two times, cannot go with."""
    attention = "xformers" if args.enable_xformers_memory_efficient_attention else args.attention
    refused = {
        f"--compile {args.compile}": args.compile != "none",
        f"--attention {attention}": attention not in (None, "sdpa", "math"),
        f"--mixflow_gamma {args.mixflow_gamma}": args.mixflow_gamma is not None,
    }
    for flag, given in refused.items():
        if given:
            raise UsageError(
                f"{flag} with --formulation mean_flow: the average velocity is learned from a "
                "forward derivative of the network, at the very times that are drawn, which that "
                "does not have; drop it."
            )


FORMULATION = Family.of(
    "formulation",
    choice(
        "formulation",
        FORMULATIONS,
        help="ddpm: variance preserving; flow: straight paths (arXiv 2401.08740); edm: "
        "preconditioning (arXiv 2206.00364), and --timestep_sampler edm unless given; mean_flow: "
        "average velocities, for one or two steps (arXiv 2505.13447), and --timestep_sampler "
        "logit_normal unless given; default: the pipeline's own, else ddpm",
    ),
    *sharing(FLOW_SHIFT, needs=_FLOW),
    *sharing(
        tracked(
            "sigma_data",
            float,
            help="standard deviation of the data in EDM's preconditioning (default: 0.5 for "
            "pixels, 1 for latents)",
            bound=_SIGMA,
        ),
        tracked("sigma_min", float, 0.002, "smallest noise level of EDM", bound=_SIGMA),
        tracked("sigma_max", float, 80.0, "largest noise level of EDM", bound=_SIGMA),
        needs=_EDM,
    ),
    *sharing(
        tracked(
            "interval_share",
            float,
            0.25,
            "share of samples with two times, between which the average velocity is learned",
            bound=SHARE,
        ),
        count(
            "interval_opening_steps",
            help="optimizer steps over which the velocity alone is learned first, then short "
            "intervals, then long ones (default: all from the first step)",
        ),
        tracked(
            "adaptive_loss_power",
            float,
            1.0,
            "power p of the weight 1 / (squared error + 0.001)^p of each sample's loss",
            bound=NOT_NEGATIVE,
            setting="objective",
            later=True,
        ),
        needs=_MEAN_FLOW,
        setting="sampler",
    ),
    tracked(
        "discrete_timesteps",
        help="draw flow and EDM levels from the scheduler's table, not continuously",
        needs=(_CONTINUOUS,),
        setting="sampler",
    ),
    choice(
        "learned_variance",
        LEARNED_VARIANCES,
        "none",
        "twice the output channels for a learned variance: trained with the variational term "
        "(arXiv 2102.09672), or ignored",
        setting="objective",
    ),
    setting="schedule",
    check=_check_formulation,
)


def _check_widths(args: Any) -> None:
    if args.power_ema and not all(0 < width < 0.28 for width in args.power_ema):
        shown = " ".join(map(str, args.power_ema))
        raise UsageError(
            f"--power_ema is {shown}: relative widths lie between 0 and 0.28; 0.05 0.1 are usual."
        )
    if len(set(args.power_ema or ())) < len(args.power_ema or ()):
        raise UsageError(f"--power_ema is {' '.join(map(str, args.power_ema))}: give each once.")


POWER_EMA = Family.of(
    "power-function average",
    tracked(
        "power_ema",
        float,
        help="widths of averages for a choice after training (arXiv 2312.02696), such as 0.05 0.1; "
        "without --use_ema the first is drawn and exported",
        nargs="+",
        metavar="SIGMA_REL",
        setting="ema",
    ),
    *sharing(
        count(
            "power_ema_snapshot_steps",
            help="optimizer steps between copies of them (default: 64 copies in all)",
        ),
        choice("power_ema_dtype", FILE_DTYPES, "float16", "number format of the copies"),
        needs=_POWER,
    ),
    check=_check_widths,
)

_DIT_NAME = re.compile(r"dit-?\w+/\d+", re.IGNORECASE)
_DIT_SIZE = re.compile(r"DiT-(S|B|L|XL)/[1-9]\d*")


def _check_network_name(args: Any) -> None:
    """Refuse a misspelt size of DiT, which would be looked for on the Hub, and two networks."""
    name, flag = args.model_config, args.flag("model_config")
    if name is None:
        return
    if _DIT_NAME.fullmatch(name) and not _DIT_SIZE.fullmatch(name):
        raise UsageError(
            f"--{flag} is {name}: write DiT-S/2, DiT-B/2, DiT-L/2 or DiT-XL/2, with any patch size "
            "that divides the latents."
        )
    if args.pretrained_model_name_or_path is not None:
        raise UsageError(
            f"--{flag} {name} and --pretrained_model_name_or_path "
            f"{args.pretrained_model_name_or_path} both say which network: drop one of the two."
        )


def _check_pipeline(args: Any) -> None:
    environment.check_folder(args, "pretrained_model_name_or_path", "a saved pipeline")
    name = args.model_config
    if name is not None and name.startswith(environment.LOCAL) and not Path(name).exists():
        raise UsageError(
            f"--{args.flag('model_config')} is {name}: there is no such file or folder. Give a "
            "config.json, its folder, or the name of a repository on the Hub."
        )


def network(config: Flag, kind: str) -> Family:
    """What is trained: a network of the flag ``config``, or one of a pipeline of some ``kind``."""
    return Family.of(
        "model",
        config,
        place("pretrained_model_name_or_path", help=f"{kind} pipeline to go on from"),
        *sharing(
            tracked("revision", str, help="branch, tag or commit of that repository"),
            tracked("variant", str, help="variant of its weight files, such as fp16"),
            needs=PRETRAINED,
        ),
        setting="model",
        check=_check_network_name,
        check_machine=_check_pipeline,
    )


PROCESS = Family.of(
    "variance preserving process",
    tracked("ddpm_num_steps", int, 1000, "number of noise levels", bound=at_least(2), most=LEVELS),
    tracked(
        "ddpm_beta_schedule",
        str,
        "linear",
        f"course of the noise: {', '.join(BETA_SCHEDULES)}",
        known=BETA_SCHEDULES,
    ),
    needs=DDPM,
    setting="schedule",
)


def pictures(*flags: Flag, sampler: str) -> Family:
    """Pictures with some flags of their own; ``sampler`` is the default for DDPM."""
    return Family.of(
        "pictures",
        tracked("no_pictures", help="draw none, neither on the way nor at the end"),
        *flags,
        tracked(
            "sampling_scheduler",
            str,
            help=f"diffusers scheduler of pictures and pipeline (default: {sampler}, "
            "FlowMatchEulerDiscreteScheduler or EDMEulerScheduler)",
            metavar="CLASS",
        ),
        pairs("sampling_scheduler_args", "its settings, for example timestep_spacing=trailing"),
    )
