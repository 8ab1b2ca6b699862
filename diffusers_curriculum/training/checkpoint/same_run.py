"""What a run may not change unnoticed when it is resumed, and what a change that is allowed does.

Everything else (length of the run, mixed precision, validation, trackers, checkpoints, number of
processes at the same global batch) may change freely.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers_curriculum.samplers.description import plain_config
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.flag import SETTINGS
from diffusers_curriculum.training.checkpoint.state import POWER_EMA
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.storage.fingerprints import (
    dataset_digest,
    flattened,
    hash_config,
    schedule_identity,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# The parts of TrainingState that start afresh, or take this run's numbers, after a change.
_RENEWED = {
    "loss_weighting": ("tracker_loss_weights",),
    "sampler": ("sampler",),
    "schedule": ("sampler", "trackers"),
    "optimizer": ("optimizer",),
    "ema": ("ema",),
    "ema.power_ema": (POWER_EMA,),
}
_TEXTS = {
    "global_batch": "--train_batch_size x --gradient_accumulation_steps x processes",
    "dataset.rows": "number of training samples",
    "dataset.sha256": "digest of captions or classes, file names and sizes",
    "model.files": "digest of the base model's file names and sizes",
    "schedule.sha256": "digest of the noise levels",
}


@dataclass(frozen=True)
class Difference:
    """One value that is not what it was.

    Attributes:
        setting: its name for --allow_config_change.
        name: dotted, such as ``sampler.density``.
        old, new: the checkpoint's value and this run's; None where there is none.
    """

    setting: str
    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        label = _TEXTS.get(self.name)
        text = f"{self.setting}: {label}" if label else self.name
        return f"{text} is {_short(self.new)}, was {_short(self.old)}"


def run_facts(
    args: Arguments, plan: BatchPlan, dataset: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
    """What goes into run.json and into the manifest of every checkpoint, as plain data.

    Args:
        dataset: of :func:`dataset_facts`.
        model: what tells the network and its frozen parts.
    """
    facts = {
        "seed": plan.seed,
        "global_batch": plan.total,
        "world_size": plan.world_size,
        "num_samples": plan.num_samples,
        "dataset": dict(dataset),
        "model": dict(model),
    }
    facts |= {setting: args.of_setting(setting) for setting in ("objective", "images", "optimizer")}
    return plain(facts)


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
        rows: as ``load_image_captions`` or ``load_images`` returned them.
        text_column: of captions or classes; None where there is none.
    """
    source = args.train_data_dir if args.dataset_name is None else args.dataset_name
    folder = source if os.path.isdir(source) else None
    return {
        "name": None if folder else source,
        "config": args.dataset_config_name,
        "sha256": dataset_digest(rows, args.image_column, text_column, folder),
    }


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they will be read back: tuples are lists."""
    return json.loads(json.dumps(facts))


def conflicts(saved: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Difference]:
    """All differences between the facts of a checkpoint and those of this run.

    A setting that the checkpoint does not tell, as it is of an older version, is passed over.
    """
    found = []
    for setting in SETTINGS:
        old, new = _setting(saved, setting), _setting(facts, setting)
        if old is None or new is None:
            continue
        old, new = dict(flattened(old, setting)), dict(flattened(new, setting))
        known = old if setting == "dataset" else old | new
        found += [
            Difference(setting, name, old.get(name), new.get(name))
            for name in known
            if old.get(name) != new.get(name)
        ]
    return found


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
        UsageError: an unknown name in ``allowed``, or a difference that it does not name.
    """
    check_names(allowed)
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


def check_names(allowed: Collection[str]) -> None:
    """Refuse names that --allow_config_change does not know.

    Raises:
        UsageError: naming them, and those there are.
    """
    unknown = [name for name in allowed if name not in SETTINGS]
    if unknown:
        raise UsageError(
            f"--allow_config_change {' '.join(unknown)}: there is no such setting; choose from "
            f"{', '.join(SETTINGS)}."
        )


def renewed_parts(changed: Collection[Difference]) -> frozenset[str]:
    """The parts that :meth:`TrainingState.read` shall not take from the checkpoint."""
    settings = {difference.setting for difference in changed}
    settings |= {difference.name for difference in changed}
    return frozenset(part for setting in settings for part in _RENEWED.get(setting, ()))


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
    return {**_own_settings(config["base"]), "curriculum": own} if "base" in config else own


def _short(value: Any) -> str:
    """A value for a message; of a digest, the first digits."""
    text = "unset" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text
