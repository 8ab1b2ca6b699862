"""Flags that say which noise levels are trained on; the same for every training script."""

from __future__ import annotations

import argparse
import math
from typing import Any

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.flag import (
    FROM_ZERO,
    LEVELS,
    POSITIVE,
    SHARE,
    Bound,
    Family,
    Flag,
    Need,
    choice,
    count,
    pairs,
    path,
    place,
    sharing,
    tracked,
)
from diffusers_curriculum.training.arguments.laws import MOVED, check_scale, is_file, settle_shift
from diffusers_curriculum.training.errors import UsageError

# Copies of names in modules that load torch; a test keeps them equal.
DRAWS = ("iid", "stratified", "antithetic", "systematic", "sobol")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
# -- what is predicted, and how its loss is weighted -----------------------------------------------

PREDICTION = Family.of(
    "objective",
    tracked(
        "prediction_type",
        str,
        help="what the network predicts (default: as its scheduler)",
        known=PREDICTION_TYPES,
        setting="prediction_type",
    ),
    tracked(
        "untrained_timestep",
        int,
        help="the timestep of zero terminal SNR, such as 999, which an epsilon prediction leaves "
        "untrained: refused unless it is named here",
        bound=FROM_ZERO,
        most=LEVELS,
    ),
    tracked(
        "snr_gamma",
        float,
        help="min-SNR loss weighting with this gamma; 5 is usual",
        bound=POSITIVE,
        setting="loss_weighting",
    ),
)


def _settle_weighting(args: Any) -> None:
    """--snr_gamma is one point of the larger family; nothing after this treats it apart."""
    if args.snr_gamma is None:
        return
    if args.loss_weighting not in ("none", "min_snr"):
        raise UsageError(
            f"--snr_gamma {args.snr_gamma} means --loss_weighting min_snr, but --loss_weighting is "
            f"{args.loss_weighting!r}: drop one of the two."
        )
    gamma = args.loss_weighting_args.get("gamma", args.snr_gamma)
    if gamma != args.snr_gamma:
        raise UsageError(
            f"--snr_gamma is {args.snr_gamma} but --loss_weighting_args has gamma={gamma}: "
            "give one of the two."
        )
    args.loss_weighting = "min_snr"
    args.loss_weighting_args = {**args.loss_weighting_args, "gamma": args.snr_gamma}


# -- what is drawn ---------------------------------------------------------------------------------


def _correction(text: str) -> str | float:
    if text in ("none", "full"):
        return text
    try:
        exponent = float(text)
    except ValueError:
        exponent = math.nan
    if not 0 <= exponent <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not none, full or an exponent in [0, 1]")
    return exponent


def _settle_bias(args: Any) -> None:
    """Turn diffusers' bias flags into the density that they stand for, drawn without a floor."""
    strategy = args.timestep_bias_strategy
    if strategy == "none":
        return
    for name in ("timestep_sampler", "timestep_sampler_args"):
        if name in args.given or args.timestep_sampler != "uniform":
            raise UsageError(
                f"--timestep_bias_strategy {strategy} and --{name} {args[name]} both say what is "
                "drawn: drop one of the two."
            )
    names = ("begin", "end") if strategy == "range" else ("portion",)
    args.timestep_sampler = "timestep_bias"
    numbers = {name: args[f"timestep_bias_{name}"] for name in ("multiplier", *names)}
    args.timestep_sampler_args = {"strategy": strategy, **numbers}
    if args.timestep_floor is None:
        args.timestep_floor = 0.0


def _settle_file(args: Any) -> None:
    """Nothing after this treats a file apart from a name that is one."""
    file = args.timestep_sampler_config
    if file is None:
        return
    if "timestep_sampler" in args.given:
        raise UsageError(
            f"--timestep_sampler_config {file} and --timestep_sampler {args.timestep_sampler} both "
            "say what is drawn: drop one of the two."
        )
    if not is_file(file):
        raise UsageError(
            f"--timestep_sampler_config is {file}: give a JSON file, its name ending in .json."
        )
    args.timestep_sampler = file


def _settle(args: Any) -> None:
    _settle_file(args)
    _settle_bias(args)
    settle_shift(args)
    _settle_weighting(args)


_BY_NAME = Need(
    "a --timestep_sampler by name; a file says them itself",
    lambda a: not is_file(a.timestep_sampler),
)
# A floor and a correction compare the drawn law with the uniform one over the open levels.
_NOT_UNIFORM = Need(
    "a --timestep_sampler other than uniform, or --curriculum_within balanced",
    lambda a: a.timestep_sampler != "uniform" or a.curriculum_within == "balanced",
)
_WITH_PARAMETERS = Need(
    "a --timestep_sampler other than uniform and a file",
    lambda a: a.timestep_sampler != "uniform" and not is_file(a.timestep_sampler),
)
_WEIGHTED = Need("--loss_weighting NAME", lambda a: a.loss_weighting != "none")
_BIASED = Need(
    "--timestep_bias_strategy earlier, later or range", lambda a: a.timestep_bias_strategy != "none"
)
_BIASED_TO_AN_END = Need(
    "--timestep_bias_strategy earlier or later",
    lambda a: a.timestep_bias_strategy in ("earlier", "later"),
)
_BIASED_TO_A_RANGE = Need(
    "--timestep_bias_strategy range", lambda a: a.timestep_bias_strategy == "range"
)

TIMESTEPS = Family.of(
    "timesteps",
    place(
        "timestep_sampler",
        "uniform",
        "density over log-SNR that timesteps are drawn from, or a law that is learned while the "
        "model trains (docs/catalogue.md); two_phase; moving; or the file "
        "timestep_sampler_config.json of any sampler",
        metavar="NAME",
    ),
    place(
        "timestep_sampler_config",
        help="the sampler of a JSON file, as save_pretrained writes it, or by hand with its type "
        "and settings; another name of --timestep_sampler FILE.json",
        metavar="FILE",
        later=True,
    ),
    pairs(
        "timestep_sampler_args", "its parameters, for example mu=0 b=0.5", needs=(_WITH_PARAMETERS,)
    ),
    *MOVED,
    choice(
        "timestep_draw",
        DRAWS,
        help="how a batch is drawn (default: iid; a sampler that learns has its own)",
        needs=(_BY_NAME,),
    ),
    tracked(
        "timestep_floor",
        float,
        help="share of the uniform law mixed in, so that no level starves (default: 0.1)",
        bound=SHARE,
        needs=(_BY_NAME, _NOT_UNIFORM),
    ),
    tracked(
        "importance_correction",
        _correction,
        help="weight losses by (uniform mass / drawn mass)^EXPONENT; full = 1 (default: none; a "
        "sampler that learns has its own)",
        metavar="none|full|EXPONENT",
        needs=(_BY_NAME, _NOT_UNIFORM),
    ),
    tracked(
        "loss_weighting",
        str,
        "none",
        "loss weight as a function of log-SNR (docs/catalogue.md); uncertainty: a learned one",
        metavar="NAME",
        setting="loss_weighting",
    ),
    pairs("loss_weighting_args", "its parameters", needs=(_WEIGHTED,), setting="loss_weighting"),
    # those of diffusers' SDXL script, short for --timestep_sampler timestep_bias
    choice(
        "timestep_bias_strategy",
        ("none", "earlier", "later", "range"),
        "none",
        "draw the cleanest or the noisiest timesteps, or a range of them, more often",
    ),
    *sharing(
        tracked("timestep_bias_multiplier", float, 1.0, "how much more often", bound=POSITIVE),
        needs=_BIASED,
    ),
    *sharing(
        tracked(
            "timestep_bias_begin",
            int,
            0,
            "first timestep of the range",
            bound=FROM_ZERO,
            most=LEVELS,
        ),
        count("timestep_bias_end", 1000, "first timestep after the range", most=LEVELS),
        needs=_BIASED_TO_A_RANGE,
    ),
    tracked(
        "timestep_bias_portion",
        float,
        0.25,
        "share of earlier or later ones",
        bound=Bound("above 0 and at most 1", lambda x: 0 < x <= 1),
        needs=(_BIASED_TO_AN_END,),
    ),
    setting="sampler",
    settle=_settle,
    check=check_scale,
)
FLOW_SHIFT = tracked(
    "flow_shift", float, 1.0, "shift of the noise levels of a flow", bound=POSITIVE
)
SLOWED = Family.of(
    "objective",
    tracked(
        "mixflow_gamma",
        float,
        help="add the noise of a level up to this share nearer to pure noise than the network is "
        "told (arXiv 2512.19311: 0.8, with --timestep_sampler mixflow); flow matching only",
        bound=Bound("above 0 and at most 1", lambda x: 0 < x <= 1),
        later=True,
    ),
    setting="objective",
)
REPORTS = Family.of(
    "timesteps",
    Flag(
        "show_timesteps",
        str,
        help="show what would be trained on in a .png, .svg or .json file, or as text, then exit",
        metavar="FILE|terminal",
        convert=path,
    ),
    count("timestep_plot_steps", 1000, "optimizer steps between pictures of the effective density"),
    check_machine=environment.check_reports,
)
