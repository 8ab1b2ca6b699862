"""Checks of a parsed command line: everything that can be known before a model is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_curriculum.training.arguments.curriculum import check_curriculum
from diffusers_curriculum.training.arguments.timesteps import is_file
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process.environment import check_environment

# diffusers' names. `piecewise_constant` needs rules that no flag can give.
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class Bound:
    """A range that several numeric arguments must lie in; a NaN lies in none."""

    wanted: str
    holds: Callable[[float], bool]
    names: str


BOUNDS = (
    Bound(
        "at least 1",
        lambda x: x >= 1,
        "train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps resolution "
        "max_train_samples checkpointing_steps checkpoints_total_limit validation_epochs "
        "validation_steps log_every timestep_plot_steps ema_interval curriculum_min_size "
        "curriculum_patience curriculum_max_stage_steps curriculum_stage_steps "
        "curriculum_total_steps timestep_bias_end num_epochs save_images_epochs save_model_epochs "
        "eval_batch_size ddpm_num_inference_steps latent_crops power_ema_snapshot_steps "
        "validation_images_per_class validation_inference_steps",
    ),
    Bound("at least 2", lambda x: x >= 2, "curriculum_clusters ddpm_num_steps"),
    Bound(
        "finite and not negative",
        lambda x: 0 <= x < math.inf,
        "learning_rate lr_warmup_steps adam_weight_decay adam_epsilon noise_offset guidance_scale "
        "input_perturbation dream_detail_preservation dataloader_num_workers "
        "curriculum_min_delta curriculum_min_stage_steps timestep_bias_begin",
    ),
    Bound("in [0, 1)", lambda x: 0 <= x < 1, "adam_beta1 adam_beta2 curriculum_smoothing"),
    Bound("in [0, 1]", lambda x: 0 <= x <= 1, "timestep_floor caption_dropout ema_decay"),
    Bound("in [0, 1]", lambda x: 0 <= x <= 1, "bad_samples_limit ema_max_decay label_dropout"),
    Bound("greater than 0", lambda x: x > 0, "curriculum_max_share max_hours"),
    Bound("finite and above 0", lambda x: 0 < x < math.inf, "snr_gamma timestep_bias_multiplier"),
    Bound(
        "finite and above 0",
        lambda x: 0 < x < math.inf,
        "flow_shift sigma_data sigma_min sigma_max ema_inv_gamma ema_power",
    ),
    Bound("above 0 and at most 1", lambda x: 0 < x <= 1, "timestep_bias_portion"),
    Bound("above 0 (inf: no clipping)", lambda x: x > 0, "max_grad_norm"),
    Bound("in [0, 2^32)", lambda x: 0 <= x < 2**32, "seed"),
)


@dataclass(frozen=True)
class Dependence:
    """Arguments that do something only under a condition."""

    names: str
    needs: str
    holds: Callable[[argparse.Namespace], bool]


# What every training script takes.
DEPENDENCES = (
    Dependence(
        "curriculum_order curriculum_clusters curriculum_clustering curriculum_boundaries "
        "curriculum_min_size curriculum_within curriculum_pacing curriculum_patience "
        "curriculum_min_delta curriculum_smoothing curriculum_min_stage_steps "
        "curriculum_max_stage_steps curriculum_stage_steps curriculum_total_steps "
        "curriculum_max_share",
        "--curriculum difficulty",
        lambda a: a.curriculum != "none",
    ),
    Dependence(
        "curriculum_boundaries",
        "--curriculum_clustering explicit",
        lambda a: a.curriculum_clustering == "explicit",
    ),
    Dependence(
        "curriculum_clusters",
        "a --curriculum_clustering other than explicit, whose boundaries fix the number",
        lambda a: a.curriculum_clustering != "explicit",
    ),
    Dependence(
        "curriculum_min_size",
        "--curriculum_clustering auto, log_snr or snr",
        lambda a: a.curriculum_clustering in ("auto", "log_snr", "snr"),
    ),
    Dependence(
        "curriculum_patience curriculum_min_delta curriculum_smoothing curriculum_min_stage_steps "
        "curriculum_max_stage_steps",
        "--curriculum_pacing patience",
        lambda a: a.curriculum_pacing == "patience",
    ),
    Dependence(
        "curriculum_stage_steps",
        "--curriculum_pacing fixed",
        lambda a: a.curriculum_pacing == "fixed",
    ),
    Dependence(
        "curriculum_total_steps",
        "--curriculum_pacing linear, cosine or root",
        lambda a: a.curriculum_pacing in ("linear", "cosine", "root"),
    ),
    Dependence(
        "timestep_sampler_args",
        "a --timestep_sampler other than uniform and a file",
        lambda a: a.timestep_sampler != "uniform" and not is_file(a.timestep_sampler),
    ),
    Dependence(
        "timestep_draw timestep_floor importance_correction",
        "a --timestep_sampler by name; a file says them itself",
        lambda a: not is_file(a.timestep_sampler),
    ),
    # Both compare the drawn law with the uniform one over the open levels: nothing to do if equal.
    Dependence(
        "timestep_floor importance_correction",
        "a --timestep_sampler other than uniform, or --curriculum_within balanced",
        lambda a: a.timestep_sampler != "uniform" or a.curriculum_within == "balanced",
    ),
    Dependence(
        "timestep_bias_multiplier",
        "--timestep_bias_strategy earlier, later or range",
        lambda a: a.timestep_bias_strategy != "none",
    ),
    Dependence(
        "timestep_bias_portion",
        "--timestep_bias_strategy earlier or later",
        lambda a: a.timestep_bias_strategy in ("earlier", "later"),
    ),
    Dependence(
        "timestep_bias_begin timestep_bias_end",
        "--timestep_bias_strategy range",
        lambda a: a.timestep_bias_strategy == "range",
    ),
    Dependence(
        "loss_weighting_args",
        "--loss_weighting NAME",
        lambda a: a.loss_weighting != "none" or getattr(a, "snr_gamma", None) is not None,
    ),
    Dependence("ema_decay ema_interval offload_ema foreach_ema", "--use_ema", lambda a: a.use_ema),
    Dependence("bad_samples_limit", "--bad_samples skip", lambda a: a.bad_samples == "skip"),
    Dependence(
        "allow_config_change", "--resume_from_checkpoint", lambda a: bool(a.resume_from_checkpoint)
    ),
    Dependence("dataset_config_name", "--dataset_name", lambda a: a.dataset_name is not None),
)


def check_arguments(
    args: argparse.Namespace,
    default_of: Callable[[str], Any],
    dependences: Sequence[Dependence] = DEPENDENCES,
) -> None:
    """Refuse what cannot work or would do nothing.

    Args:
        args: parsed arguments, ``KEY=VALUE`` lists already turned into dicts; a script need not
            have all those that are checked here.
        default_of: the parser's default of an argument.
        dependences: those of the script.

    Raises:
        UsageError: with the value and the remedy.
    """
    for bound in BOUNDS:
        _check_bound(args, bound)
    _check_names(args)
    for dependence in dependences:
        _check_dependence(args, dependence, default_of)
    _check_snr_gamma(args)
    check_curriculum(args)
    check_environment(args)


def _check_bound(args: argparse.Namespace, bound: Bound) -> None:
    for name in bound.names.split():
        value = getattr(args, name, None)
        if value is not None and not bound.holds(value):
            raise UsageError(f"--{name} is {value}: it must be {bound.wanted}.")


def _check_names(args: argparse.Namespace) -> None:
    # The official flags take any word, so these are not `choices` of the parser.
    for name, known in (("lr_scheduler", LR_SCHEDULERS), ("prediction_type", PREDICTION_TYPES)):
        value = getattr(args, name, None)
        if value is not None and value not in known:
            raise UsageError(f"--{name} is {value!r}: choose from {', '.join(known)}.")


def _check_dependence(
    args: argparse.Namespace, dependence: Dependence, default_of: Callable[[str], Any]
) -> None:
    names = [name for name in dependence.names.split() if hasattr(args, name)]
    if not names or dependence.holds(args):
        return
    for name in names:
        value = getattr(args, name)
        # argparse does not tell what was typed: given but equal to the default counts as not given.
        # An empty dict is a KEY=VALUE list that was not given.
        if value != default_of(name) and value != {}:
            raise UsageError(
                f"--{name} is {_shown(value)}, which has no effect without {dependence.needs}: "
                f"add that, or drop --{name}."
            )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    return "set" if value is True else str(value)


def _check_snr_gamma(args: argparse.Namespace) -> None:
    if getattr(args, "snr_gamma", None) is None:
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
