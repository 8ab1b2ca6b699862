"""The kinds of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.cells import ConfigError
from benchmarks.evidence.images import FineTuningTask, ImageTask
from benchmarks.evidence.mixtures import MixtureTask
from benchmarks.evidence.training import Task

KINDS: dict[str, Any] = {"images": ImageTask, "fine_tuning": FineTuningTask, "mixture": MixtureTask}


def task_of(config: Mapping[str, Any], settings: Mapping[str, Any], cache_dir: Path) -> Task:
    """The task of a config file, with its data; ConfigError for an unknown kind."""
    if config["kind"] not in KINDS:
        raise ConfigError(f"no task is of kind {config['kind']!r}: choose from {', '.join(KINDS)}.")
    return KINDS[config["kind"]](config, settings, cache_dir)
