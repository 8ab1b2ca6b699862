"""Recipes: what a paper trains with, in one word, as flags that need not be typed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers_curriculum.training.arguments.flag import Family, choice
from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

# Flags that say the same otherwise: beside one of them a recipe's own is left out.
_RIVALS = {
    "loss_weighting": ("snr_gamma",),
    "loss_weighting_args": ("snr_gamma", "loss_weighting"),
    "timestep_sampler": ("timestep_bias_strategy",),
    "timestep_sampler_args": ("timestep_sampler", "timestep_bias_strategy"),
    "sampling_scheduler_args": ("sampling_scheduler",),
}


@dataclass(frozen=True)
class Recipe:
    """What a paper says of noise levels, objective and inference; not of networks and optimizers.

    Attributes:
        source: the paper.
        settings: arguments by name, given those of the command line.
    """

    source: str
    settings: Callable[[Any], dict[str, Any]]


def _laplace(args: Any) -> dict[str, Any]:
    """Inference begins at 0.99 of the cosine clock: timesteps 990, 970, ..., 10."""
    return {
        "formulation": "ddpm",
        "ddpm_beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_sampler": "laplace",
        "timestep_sampler_args": {"mu": 0.0, "b": 0.75 if args.resolution >= 512 else 0.5},
        "timestep_floor": 0.0,
        "importance_correction": "none",
        "loss_weighting": "none",
        "sampling_scheduler": "DDIMScheduler",
        "sampling_scheduler_args": {"timestep_spacing": "leading", "steps_offset": 10},
        "validation_inference_steps": 50,
        "eval_num_inference_steps": 50,
    }


def _sd3(args: Any) -> dict[str, Any]:
    return {
        "formulation": "flow",
        "flow_shift": 3.0 if args.resolution >= 1024 else 1.0,
        "timestep_sampler": "logit_normal",
        "timestep_sampler_args": {"mean": 0.0, "std": 1.0},
        "timestep_floor": 0.0,
        "importance_correction": "none",
        "loss_weighting": "none",
    }


def _log_normal(args: Any) -> dict[str, Any]:
    """The parameters of the law follow from --sigma_data."""
    none = {"importance_correction": "none", "loss_weighting": "none"}
    return {"formulation": "edm", "timestep_sampler": "edm", "timestep_floor": 0.0} | none


RECIPES = {
    "denoising-difficulty": Recipe(
        "arXiv 2403.10348",
        lambda args: {
            "curriculum": "difficulty",
            "curriculum_order": "easy_to_hard",
            "curriculum_clusters": 20,
            "curriculum_pacing": "patience",
            "curriculum_patience": 200,
            "loss_weighting": "none",
        },
    ),
    "laplace-2407.03297": Recipe("arXiv 2407.03297", _laplace),
    "sd3": Recipe("arXiv 2403.03206", _sd3),
    "edm": Recipe("arXiv 2206.00364", _log_normal),
    "edm2": Recipe(
        "arXiv 2312.02696",
        lambda args: (
            _log_normal(args)
            | {
                "timestep_sampler": "edm2",
                "loss_weighting": "uncertainty",
                "power_ema": [0.05, 0.1],
            }
        ),
    ),
    "min-snr": Recipe(
        "arXiv 2303.09556",
        lambda args: {"loss_weighting": "min_snr", "loss_weighting_args": {"gamma": 5.0}},
    ),
}


def put_recipe(args: Any) -> None:
    """Put a recipe's settings where nothing was given, and say which of them give way; those that
    the command line has no flag for are left out."""
    if args.recipe is None:
        return
    known = {flag.dest for flag in args.flags}
    settings = RECIPES[args.recipe].settings(args)
    taken = {k: v for k, v in settings.items() if k in known and _takes(args, k, v)}
    for name, value in taken.items():
        setattr(args, name, value)
    args.by_recipe = frozenset(taken)
    args.given |= args.by_recipe


def without_flag(args: Any) -> dict[str, Any]:
    """The settings of the recipe, if any, that the command line has no flag for."""
    if args.recipe is None:
        return {}
    known = {flag.dest for flag in args.flags}
    return {k: v for k, v in RECIPES[args.recipe].settings(args).items() if k not in known}


def _expand(args: Any) -> None:
    if args.recipe is not None:
        _refuse_foreign(args)
        put_recipe(args)


def _refuse_foreign(args: Any) -> None:
    """Refuse a recipe for another kind of model than is trained."""
    missing = [*without_flag(args)]
    if missing:
        raise UsageError(
            f"--recipe {args.recipe} sets --{missing[0]}, which this script has no flag for, as "
            "its noise levels are those of the model: use the class-conditional or the "
            "unconditional script, or give the other flags of the recipe (docs/differences.md)."
        )
    wanted = RECIPES[args.recipe].settings(args).get("formulation")
    if "formulation" in args.given and wanted not in (None, args.formulation):
        raise UsageError(
            f"--recipe {args.recipe} is for --formulation {wanted}, and --formulation is "
            f"{args.formulation}: drop one of the two."
        )


def _takes(args: Any, name: str, value: Any) -> bool:
    """Whether a setting of the recipe holds; what gives way is told."""
    rivals = [rival for rival in (name, *_RIVALS.get(name, ())) if rival in args.given]
    if not rivals:
        return True
    if name not in args.given or args[name] != value:
        given = ", ".join(f"--{args.flag(rival)} {args[rival]}" for rival in rivals)
        logger.warning(
            "--recipe %s has --%s %s, which gives way to %s", args.recipe, name, value, given
        )
    return False


RECIPE = Family.of(
    "timesteps",
    choice(
        "recipe",
        tuple(RECIPES),
        help="the settings of a paper for noise levels, objective and inference in one word "
        "(docs/differences.md#recipes); a flag beside it takes the place of the recipe's",
    ),
    expand=_expand,
)
