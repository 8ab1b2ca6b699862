"""A recipe in a preview, whose schedule is that of SOURCE."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.flag import Family, Need
from diffusers_curriculum.training.arguments.laws import settle_log_normal
from diffusers_curriculum.training.arguments.recipes import RECIPE, put_recipe, without_flag
from diffusers_curriculum.training.arguments.run import IMAGES

logger = logging.getLogger(__name__)

_NAMED = Need("--recipe NAME", lambda args: args.recipe is not None)
RECIPES = (
    replace(RECIPE, expand=put_recipe),
    Family("timesteps", tuple(flag for flag in IMAGES.flags if flag.name == "resolution")),
)
CHANGES = {
    "resolution": {
        "default": 256,
        "help": "side of the training images, which some recipes look at (default: 256)",
        "needs": (_NAMED,),
    }
}


def settle_recipe(args: Arguments, scheduler: Any) -> None:
    """The law of a recipe for EDM follows the scale of the data that the ``scheduler`` assumes, as
    it does in the scripts."""
    if scheduler is None or "timestep_sampler" not in args.by_recipe:
        return
    from diffusers_curriculum.noise_levels import NoiseLevels

    sigma_data = NoiseLevels.from_scheduler(scheduler).sigma_data
    if sigma_data is not None:
        settle_log_normal(args, sigma_data)


def check_recipe(args: Arguments, source: str, scheduler: Any) -> None:
    """Say what of the recipe is left to SOURCE, whose training scheduler is given (None: it holds a
    sampler alone).

    Raises:
        ValueError: the recipe trains on another schedule.
    """
    from diffusers_curriculum.noise_levels import NoiseLevels
    from diffusers_curriculum.training.levels.formulations import FAMILIES, SCHEDULE

    left = without_flag(args)
    formulation = left.pop("formulation", None)
    if scheduler is not None and formulation is not None:
        family = NoiseLevels.from_scheduler(scheduler).family
        found = next(name for name, kind in FAMILIES.items() if kind == family)
        _refuse_other(args, source, {"formulation": formulation}, {"formulation": found})
        names = {flag: name for flag, name in SCHEDULE[formulation].items() if flag in left}
        wanted = {flag: left.pop(flag) for flag in names}
        theirs = {flag: scheduler.config.get(name) for flag, name in names.items()}
        _refuse_other(args, source, wanted, theirs)
    if left:
        logger.warning(
            "--recipe %s: a preview leaves out its %s; SOURCE's scheduler samples, in "
            "--inference_steps",
            *(args.recipe, ", ".join(f"--{name}" for name in left)),
        )


def _refuse_other(
    args: Arguments, source: str, wanted: dict[str, Any], found: dict[str, Any]
) -> None:
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"--recipe {args.recipe} trains with --{name} {value} (--resolution "
                f"{args.resolution}), and {source} has {found[name]}: give the schedule that the "
                "recipe trains on as SOURCE, or drop --recipe and give its other flags by hand "
                "(docs/differences.md#recipes)."
            )
