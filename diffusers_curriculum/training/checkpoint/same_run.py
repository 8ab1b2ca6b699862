"""What a run may not change unnoticed when it is resumed, and what a change that is allowed does.

Everything else (length of the run, mixed precision, validation, trackers, checkpoints, number of
processes at the same global batch) may change freely.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers_curriculum.densities import on_clock, portable_parameters
from diffusers_curriculum.samplers import DensityTimestepSampler, learning_samplers
from diffusers_curriculum.samplers.description import plain_config, upgraded_config
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.flag import SETTINGS
from diffusers_curriculum.training.arguments.imports import module_name
from diffusers_curriculum.training.checkpoint.state import POWER_EMA
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.storage.fingerprints import (
    dataset_digest,
    flattened,
    hash_config,
    module_identity,
    schedule_identity,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# The parts of TrainingState that start afresh after a change; numbers are always this run's.
_RENEWED = {
    "loss_weighting": ("tracker_loss_weights",),
    "sampler": ("sampler",),
    "schedule": ("sampler", "trackers"),
    "ema": ("ema",),
    "ema.power_ema": (POWER_EMA,),
}
_AUTO = ("log_snr", "quantile")  # what --curriculum_clustering auto is, or was
_OF_FLAGS = ("objective", "images", "optimizer", "compile")  # settings that the flags tell
_LATER = ("background",)  # flags of later versions, which are facts where they are set
_TEXTS = {
    "global_batch": "--train_batch_size x --gradient_accumulation_steps x processes",
    "dataset.rows": "number of training samples",
    "dataset.sha256": "digest of captions or classes, file names and sizes",
    "dataset.held_out": "the same of the samples that are kept apart",
    "model.files": "digest of the base model's file names and sizes",
    "model.weights": "digest of the base model's frozen network",
    "schedule.sha256": "digest of the noise levels",
}


@dataclass(frozen=True)
class Difference:
    """One value that is not what it was."""

    setting: str  # its name for --allow_config_change
    name: str  # dotted, such as ``sampler.density``
    old: Any  # the checkpoint's value, None where there is none
    new: Any  # this run's

    def __str__(self) -> str:
        text = f"{self.setting}: {_TEXTS[self.name]}" if self.name in _TEXTS else self.name
        return f"{text} is {_short(self.new)}, was {_short(self.old)}"


def run_facts(
    args: Arguments, plan: BatchPlan, dataset: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
    """What goes into run.json and into the manifest of every checkpoint, as plain data.

    Args:
        dataset: of :func:`dataset_facts`.
        model: what tells the network and its frozen parts.
    """
    facts: dict[str, Any] = {
        "seed": plan.seed,
        "global_batch": plan.total,
        "world_size": plan.world_size,
        "num_samples": plan.num_samples,
        "dataset": {**dataset, **plan.facts},
        "model": dict(model),
    }
    facts["imports"] = {n: module_identity(sys.modules[n]) for n in map(module_name, args.imports)}
    flags = {name: args.of_setting(name) for name in _OF_FLAGS}
    if adapter := args.of_setting("adapter"):
        flags["adapter"] = adapter
    for told in flags.values():
        for name in [name for name in _LATER if told.get(name, 0) is None]:
            del told[name]
    return plain(facts | flags)


def check_imports(args: Arguments, saved: Mapping[str, Any] | None) -> None:
    """Refuse a run to resume whose own modules are not imported again: what a checkpoint names is
    not imported because it says so.

    Raises:
        UsageError: --import lacks one of them, and "imports" is not allowed to change.
    """
    before = (saved or {}).get("imports", {})
    missing = sorted(before.keys() - map(module_name, args.imports))
    if missing and "imports" not in args.allow_config_change:
        raise UsageError(
            f"the run to resume imported {', '.join(missing)}, whose laws it may draw from: give "
            f"--import {' '.join(missing)} again, or accept another meaning of their names with "
            "--allow_config_change imports."
        )


def level_facts(args: Arguments, levels: Levels) -> dict[str, Any]:
    """What a run on noise levels adds to its facts, as plain data."""
    settings = plain_config(levels.sampler)
    name, parameters = levels.weighting
    return plain(
        {
            "schedule": schedule_identity(levels.sampler.levels),
            "prediction_type": levels.objective.prediction_type,
            "sampler": settings,
            "sampler_sha256": hash_config(settings),
            "loss_weighting": {"name": name, **parameters},
            "ema": _ema_facts(args),
        }
    )


def dataset_facts(args: Arguments, rows: Dataset, text_column: str | None) -> dict[str, Any]:
    """Config and digest of a data set; the name too, unless it is a folder, which may be moved.

    Args:
        rows: as ``load_images`` returned them.
        text_column: of captions or classes; None where there is none.
    """
    source = args.train_data_dir if args.dataset_name is None else args.dataset_name
    folder = source if source is not None and os.path.isdir(source) else None
    return {
        "name": None if folder else source,
        "config": args.dataset_config_name,
        "sha256": dataset_digest(rows, args.image_column, text_column, folder),
    }


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they will be read back: tuples are lists."""
    return json.loads(json.dumps(facts))


def conflicts(saved: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Difference]:
    """All differences between the facts of a checkpoint and those of this run, of settings that the
    checkpoint tells: an older version knew fewer."""
    found = []
    if "sampler" in saved:
        saved = {**saved, "sampler": upgraded_config(saved["sampler"])}
    for setting in SETTINGS:
        told = [_setting(side, setting) for side in (saved, facts)]
        if None in told:
            continue
        old, new = (dict(flattened(side, setting)) for side in told)
        known = old if setting == "dataset" else old | new
        pairs = ((name, old.get(name), new.get(name)) for name in known)
        found += [Difference(setting, *pair) for pair in pairs if pair[1] != pair[2]]
    return found


def keep_choices(args: Arguments, saved: Mapping[str, Any]) -> None:
    """Take from the facts of the checkpoint what its sampler chose by a default that has changed
    since, and the flags leave open: a new version is no other run."""
    if (settings := upgraded_config(saved.get("sampler"))) is None:
        return
    base = settings.get("laws", [settings])[0]  # of several, that of the command line
    clustering = base.get("clustering")
    if args.curriculum_clustering == "auto" and clustering in _AUTO:
        args.curriculum_clustering = clustering
        _log_choices({"clustering": clustering})
    while "base" in base:
        base = base["base"]
    if _law_of(base) == args.timestep_sampler:
        left_open = _left_open(args.timestep_sampler_args, base)
        args.timestep_sampler_args = {**args.timestep_sampler_args, **left_open}
        _log_choices(left_open)


def _left_open(told: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings ``base`` have by a default that has changed, and is not told."""
    if _is_density(base):
        return _unmoved(base["density"], told, base["density_args"])
    measure = {"measure": base["measure"]} if "measure" in base.keys() - told.keys() else {}
    law, args = told.get("warm_up_density", "uniform"), told.get("warm_up_density_args") or {}
    moved = _unmoved(law, args, base["warm_up_density_args"])
    return measure | ({"warm_up_density_args": {**args, **moved}} if moved else {})


def _unmoved(law: str, told: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``chosen`` says that the law does not move with its schedule, as laws did not, if the
    rest of it is told."""
    try:
        plain = portable_parameters(law, told)
        unmoved = on_clock(law, plain, 1.0)
    except (KeyError, ValueError):  # the sampler will say what is wrong
        return {}
    if unmoved != chosen:
        return {}
    return {name: value for name, value in chosen.items() if plain.get(name) != value}


def _log_choices(choices: Mapping[str, Any]) -> None:
    for name, value in choices.items():
        logger.info("%s=%s, as the run that is resumed has it.", name, value)


def _law_of(settings: Mapping[str, Any]) -> str:
    """The name of a sampler in its config, as --timestep_sampler has it."""
    if _is_density(settings):
        return settings["density"]
    names = {kind.__name__: name for name, kind in learning_samplers().items()}
    return names.get(settings["_class_name"], "")


def _is_density(settings: Mapping[str, Any]) -> bool:
    return settings.get("_class_name", "") in ("", DensityTimestepSampler.__name__)


def check_same_run(
    facts: Mapping[str, Any], saved: Mapping[str, Any] | None, allowed: Collection[str] = ()
) -> list[Difference]:
    """Refuse to go on as another run than the one that was stopped.

    Args:
        facts: of this run, from :func:`run_facts`.
        saved: of the checkpoint's manifest; None if none is resumed.
        allowed: settings that may differ; the keys of ``SETTINGS``.

    Returns:
        The differences that were allowed; each is logged with what it does.

    Raises:
        UsageError: a difference that ``allowed`` does not name.
    """
    found = [] if saved is None else conflicts(saved, facts)
    refused = [difference for difference in found if difference.setting not in allowed]
    if refused:
        names = " ".join(dict.fromkeys(difference.setting for difference in refused))
        raise UsageError(
            f"the run to resume would not go on: {'; '.join(map(str, refused))}. Resume with the "
            f"arguments of the run that wrote it, accept this with --allow_config_change {names}, "
            "or start a new run from its weights."
        )
    for difference in found:
        logger.warning("Changed: %s (%s).", difference, SETTINGS[difference.setting])
    return found


def renewed_parts(changed: Collection[Difference]) -> frozenset[str]:
    """The parts that :meth:`TrainingState.read` shall not take from the checkpoint."""
    names = (name for difference in changed for name in (difference.setting, difference.name))
    return frozenset(part for name in names for part in _RENEWED.get(name, ()))


def _ema_facts(args: Arguments) -> dict[str, Any]:
    told = args.of_setting("ema")
    widths = told.pop("power_ema", None)
    more = {name.removeprefix("ema_"): value for name, value in told.items() if value}
    facts = {"decay": args.ema_decay} | more if args.use_ema else {}
    return facts | ({"power_ema": widths} if widths else {})


def _setting(facts: Mapping[str, Any], setting: str) -> Any:
    """The values behind one name of --allow_config_change, None where they are not told."""
    if setting == "dataset":
        told = {"rows": facts.get("num_samples")} | facts.get("dataset", {})
        return {key: value for key, value in told.items() if value is not None} or None
    value = facts.get(setting)
    return _own_settings(value) if setting == "sampler" and value is not None else value


def _own_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A sampler's config without what other settings tell (noise schedule and seed), its base's
    settings first, so that a sampler with and one without a curriculum differ in that alone."""
    own = {key: v for key, v in config.items() if key not in ("base", "scheduler", "seed")}
    if "phases" in own:
        parts = [{**phase, "sampler": _own_settings(phase["sampler"])} for phase in own["phases"]]
        own |= {"phases": {str(number): part for number, part in enumerate(parts, 1)}}
    if "laws" in own:
        own |= {"laws": {str(n): _own_settings(law) for n, law in enumerate(own["laws"])}}
    return {**_own_settings(config["base"]), "curriculum": own} if "base" in config else own


def _short(value: Any) -> str:
    """A value for a message; of a digest, the first digits."""
    text = "unset" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text
