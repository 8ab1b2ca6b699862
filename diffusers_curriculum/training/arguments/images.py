"""Arguments that class-conditional and unconditional training share.

Importing this module loads no model code.
"""

from __future__ import annotations

import argparse
import math
import re

from diffusers_curriculum.training.arguments.checks import Dependence
from diffusers_curriculum.training.arguments.evaluation import check_evaluation
from diffusers_curriculum.training.errors import UsageError

FORMULATIONS = ("ddpm", "flow", "edm")
LEARNED_VARIANCES = ("none", "vlb", "ignore")
# diffusers' schedules that need no table.
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")

IMAGE_DEPENDENCES = (
    Dependence(
        "prediction_type ddpm_num_steps ddpm_beta_schedule",
        "--formulation ddpm",
        lambda a: a.formulation == "ddpm",
    ),
    Dependence("flow_shift", "--formulation flow", lambda a: a.formulation == "flow"),
    Dependence(
        "sigma_data sigma_min sigma_max", "--formulation edm", lambda a: a.formulation == "edm"
    ),
    Dependence(
        "discrete_timesteps",
        "--formulation flow or edm, which are drawn continuously otherwise",
        lambda a: a.formulation in ("flow", "edm"),
    ),
    Dependence(
        "cache_latents",
        "--pretrained_vae_model_name_or_path or the autoencoder of a pretrained pipeline",
        lambda a: bool(a.pretrained_vae_model_name_or_path or a.pretrained_model_name_or_path),
    ),
    Dependence(
        "preserve_input_precision",
        "images to train on (drop --cache_latents)",
        lambda a: not a.cache_latents,
    ),
    Dependence(
        "latent_cache_dir latent_cache_dtype latent_crops",
        "--cache_latents",
        lambda a: a.cache_latents,
    ),
    Dependence(
        "power_ema_snapshot_steps power_ema_dtype", "--power_ema", lambda a: bool(a.power_ema)
    ),
)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Which network is trained, in which space."""
    add = parser.add_argument_group("autoencoder").add_argument
    add(
        "--pretrained_vae_model_name_or_path",
        help="autoencoder (AutoencoderKL, VQModel or ViTVQModel) whose latents are trained on: a "
        "repository on the Hub or a folder (default: the pipeline's own, else pixels)",
    )
    add(
        "--cache_latents",
        action="store_true",
        help="encode every image once and keep mean and std of its latents on disk",
    )
    add("--latent_cache_dir", help="folder for them (default: latents in --output_dir)")
    add(
        "--latent_cache_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="number format of the files",
    )
    add("--latent_crops", type=int, default=1, help="random crops kept of each image")


def add_formulation_arguments(parser: argparse.ArgumentParser) -> None:
    """How noise is added."""
    add = parser.add_argument_group("formulation").add_argument
    add(
        "--formulation",
        choices=FORMULATIONS,
        help="ddpm: variance preserving; flow: straight paths (arXiv 2401.08740); edm: "
        "preconditioning with log-normal sigma (arXiv 2206.00364); default: the pipeline's own, "
        "else ddpm",
    )
    add("--flow_shift", type=float, default=1.0, help="shift of the noise levels of a flow")
    add(
        "--sigma_data",
        type=float,
        help="standard deviation of the data in EDM's preconditioning (default: 0.5 for pixels, 1 "
        "for latents)",
    )
    add("--sigma_min", type=float, default=0.002, help="smallest noise level of EDM")
    add("--sigma_max", type=float, default=80.0, help="largest noise level of EDM")
    add(
        "--discrete_timesteps",
        action="store_true",
        help="draw flow and EDM levels from the scheduler's table, not continuously",
    )
    add(
        "--learned_variance",
        choices=LEARNED_VARIANCES,
        default="none",
        help="twice the output channels for a learned variance: trained with the variational term "
        "(arXiv 2102.09672), or ignored",
    )


def add_power_ema_arguments(parser: argparse.ArgumentParser) -> None:
    """Averages whose width may be chosen after training."""
    add = parser.add_argument_group("power-function average").add_argument
    add(
        "--power_ema",
        type=float,
        nargs="+",
        metavar="SIGMA_REL",
        help="widths of averages for a choice after training (arXiv 2312.02696), such as 0.05 0.1; "
        "without --use_ema the first is drawn and exported",
    )
    add(
        "--power_ema_snapshot_steps",
        type=int,
        help="optimizer steps between copies of them (default: 64 copies in all)",
    )
    add(
        "--power_ema_dtype",
        choices=("float32", "float16"),
        default="float16",
        help="number format of the copies",
    )


def settle_formulation(args: argparse.Namespace) -> None:
    """Put the defaults that depend on one another, before anything is checked.

    The formulation is that of the pretrained pipeline, ddpm without one. EDM draws log-normally
    without a floor, as its paper does, unless a sampler or a floor is given.
    """
    if args.formulation is None and args.pretrained_model_name_or_path is not None:
        from diffusers_curriculum.training.levels.formulations import formulation_of

        args.formulation = formulation_of(args)
    args.formulation = args.formulation or "ddpm"
    if args.timestep_sampler is not None:
        return
    args.timestep_sampler = "uniform"
    if args.formulation == "edm" and args.timestep_bias_strategy == "none":
        _settle_log_normal(args)


def _settle_log_normal(args: argparse.Namespace) -> None:
    """The paper's law is meant for data of standard deviation 0.5; other data have other noise."""
    from diffusers_curriculum.training.levels.formulations import sigma_data_of

    args.timestep_sampler = "edm"
    if args.timestep_sampler_args is None:
        shift = math.log(sigma_data_of(args) / 0.5)
        args.timestep_sampler_args = [f"p_mean={-1.2 + shift:.6g}"] if shift else None
    if args.timestep_floor is None:
        args.timestep_floor = 0.0


_DIT_NAME = re.compile(r"dit-?\w+/\d+", re.IGNORECASE)
_DIT_SIZE = re.compile(r"DiT-(S|B|L|XL)/[1-9]\d*")


def check_network_name(flag: str, name: str | None) -> None:
    """Refuse a misspelt size of DiT, which would be looked for on the Hub.

    Raises:
        UsageError: with the sizes there are.
    """
    if name is not None and _DIT_NAME.fullmatch(name) and not _DIT_SIZE.fullmatch(name):
        raise UsageError(
            f"--{flag} is {name}: write DiT-S/2, DiT-B/2, DiT-L/2 or DiT-XL/2, with any patch size "
            "that divides the latents."
        )


def check_image_arguments(args: argparse.Namespace) -> None:
    """Refuse combinations that cannot be.

    Raises:
        UsageError: with the value and the remedy.
    """
    check_evaluation(args)
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
    if args.ddpm_beta_schedule not in BETA_SCHEDULES:
        raise UsageError(
            f"--ddpm_beta_schedule is {args.ddpm_beta_schedule!r}: choose from "
            f"{', '.join(BETA_SCHEDULES)}."
        )
    if args.power_ema and not all(0 < width < 0.28 for width in args.power_ema):
        shown = " ".join(map(str, args.power_ema))
        raise UsageError(
            f"--power_ema is {shown}: relative widths lie between 0 and 0.28; 0.05 0.1 are usual."
        )
