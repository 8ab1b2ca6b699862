"""Flags that say how far a law is moved: by the shift of a family, by the scale of the data."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers_curriculum.training.arguments.flag import SIDE, Need, choice, count, tracked
from diffusers_curriculum.training.errors import UsageError

# Copies of names in modules that load torch; a test keeps them equal.
TOKEN_PRESETS = ("flux", "flux2", "qwen-image", "krea2", "ltx-2")
FIXED_PRESETS = ("sd3", "wan-musubi", "wan-diffsynth", "z-image-musubi", "z-image-diffsynth")
# Laws that papers state for data of some scale, and that scale; others are of the model's clock.
SCALED_LAWS = dict.fromkeys(
    (
        *("laplace", "cauchy", "cosine", "cosine_shifted", "cosine_scaled", "normal", "logistic"),
        *("split_normal", "log_snr_uniform", "spline", "tabulated", "moving"),
    ),
    1.0,
) | {"edm": 0.5, "edm2": 0.5}
_OF_LAWS = ("mixture", "truncated")  # which move as what they are made of does


def is_file(timestep_sampler: str) -> bool:
    """Whether ``--timestep_sampler`` names a file and not a law."""
    return timestep_sampler.endswith(".json")


def settle_shift(args: Any) -> None:
    """Move the law that is drawn as a family's schedule is; uniform timesteps stand for a uniform
    noise fraction."""
    preset, name = args.timestep_shift_preset, args.timestep_sampler
    if preset is None:
        return
    if is_file(name):
        raise UsageError(
            f"--timestep_shift_preset {preset} moves a density, and --timestep_sampler {name} is a "
            "file, which says all of its law itself: drop one of the two."
        )
    if preset in TOKEN_PRESETS and args.timestep_shift_tokens is None:
        raise UsageError(
            f"--timestep_shift_preset {preset} depends on the number of image tokens: give "
            "--timestep_shift_tokens, for this family's images usually (height / 16) x (width / "
            "16), 4096 at 1024 pixels."
        )
    moved = {"density": "flow_uniform" if name == "uniform" else name, "preset": preset}
    tokens = {"tokens": args.timestep_shift_tokens} if preset in TOKEN_PRESETS else {}
    own = {"density_args": args.timestep_sampler_args} if args.timestep_sampler_args else {}
    args.timestep_sampler, args.timestep_sampler_args = "shifted", moved | tokens | own


def settle_log_normal(args: Any, sigma_data: float) -> None:
    """EDM's law, without a floor, for data of standard deviation ``sigma_data``: both papers' laws
    are for 0.5, and other data have other noise."""
    if "timestep_sampler" not in args.by_recipe:
        args.timestep_sampler = "edm"
    p_mean = {"edm": -1.2, "edm2": -0.4}.get(args.timestep_sampler)
    moved = "timestep_sampler_args" in args.given or args.data_scale != 1
    if not moved and p_mean is not None:
        shift = math.log(sigma_data / 0.5)
        args.timestep_sampler_args = {"p_mean": float(f"{p_mean + shift:.6g}")} if shift else {}
    if args.timestep_floor is None:
        args.timestep_floor = 0.0


def settle_logit_normal(args: Any) -> None:
    """MeanFlow's law, without a floor (arXiv 2505.13447, table 1)."""
    if "timestep_sampler" not in args.by_recipe:
        args.timestep_sampler = "logit_normal"
        args.timestep_sampler_args = {"mean": -0.4, "std": 1.0} | args.timestep_sampler_args
    if args.timestep_floor is None:
        args.timestep_floor = 0.0


def _scale(text: str) -> str | float:
    if text == "auto":
        return text
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto or a finite number above 0")
    return scale


def check_scale(args: Any) -> None:
    if args.data_scale != 1:
        meant_for(args)


def meant_for(args: Any) -> float:
    """Standard deviation of the data that the law of --timestep_sampler is meant for.

    Raises:
        UsageError: it has none, or a part of it has none or another one: it cannot be moved.
    """
    whole = "--timestep_sampler", args.timestep_sampler, args.timestep_sampler_args
    scales: dict[float, str] = {}
    for where, name in _parts(*whole):
        if name not in SCALED_LAWS:
            raise UsageError(
                f"--data_scale is {args.data_scale}, which moves a law that is meant for data of "
                f"unit scale, and {where} is {name}: drop it, or draw from one of "
                f"{', '.join(SCALED_LAWS)}, or a mixture or truncated part (low, high) of such."
            )
        scales[SCALED_LAWS[name]] = f"{where} is {name}"
    if len(scales) > 1:
        told = ", ".join(f"{part}, for data of {scale:g}" for scale, part in scales.items())
        raise UsageError(
            f"--data_scale is {args.data_scale}, which moves all of a law by one shift, and its "
            f"parts are meant for different data ({told}): drop it, or give normal for edm and "
            "edm2, with mean=-2 p_mean-2 ln 2 and std=2 p_std, which is meant for data of 1."
        )
    return next(iter(scales), 1.0)


def _parts(where: str, name: Any, own: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where each law stands that one is made of, and its name; what is no law is left to those who
    make it."""
    limits = [limit for limit in ("min_timestep", "max_timestep") if own.get(limit) is not None]
    if name not in _OF_LAWS:
        yield where, name
    elif name == "truncated" and limits:
        yield where, f"truncated at {limits[0]}={own[limits[0]]}, which does not follow the data"
    elif name == "truncated":
        yield from _part(f"{where} {name} density", own)
    else:
        found = own.get("components")
        for i, component in enumerate(found if isinstance(found, list) else ()):
            yield from _part(f"{where} {name} components[{i}]", component)


def _part(where: str, part: Any) -> Iterator[tuple[str, str]]:
    if isinstance(part, Mapping) and isinstance(part.get("density"), str):
        own = {k: v for k, v in part.items() if k not in ("density", "density_args")}
        nested = part.get("density_args")
        own |= nested if isinstance(nested, Mapping) else {}
        yield from _parts(where, part["density"], own)


_BY_TOKENS = Need(
    f"a --timestep_shift_preset that depends on them: {', '.join(TOKEN_PRESETS)}",
    lambda a: a.timestep_shift_preset in TOKEN_PRESETS,
)
MOVED = (
    choice(
        "timestep_shift_preset",
        (*TOKEN_PRESETS, *FIXED_PRESETS),
        help="move the law towards noise as this family of models is trained (docs/catalogue.md, "
        "shift presets)",
    ),
    count(
        "timestep_shift_tokens",
        help="image tokens of a sample",
        needs=(_BY_TOKENS,),
        most=(SIDE // 16) ** 2,
    ),
    tracked(
        "data_scale",
        _scale,
        1.0,
        "standard deviation of the data: a law that is meant for unit data (edm, edm2: 0.5), or a "
        "mixture or truncated part of such, is moved by -2 ln of it; auto: as measured on the "
        "first samples",
        metavar="auto|1|NUMBER",
    ),
)
