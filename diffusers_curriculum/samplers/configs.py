"""Schedulers and samplers as plain, JSON-able configs, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin


def plain_config(configured: ConfigMixin) -> dict[str, Any]:
    """The config of a scheduler or sampler as plain values, its class under ``_class_name``."""
    values = {k: v for k, v in configured.config.items() if not k.startswith("_")}
    values = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}
    return {"_class_name": type(configured).__name__, **values}


def build_scheduler(scheduler: Any) -> Any:
    """A scheduler from its config; an instance is returned as it is.

    Raises:
        ValueError: the class is not a scheduler of diffusers.
    """
    if not isinstance(scheduler, Mapping):
        return scheduler
    name = scheduler.get("_class_name", "")
    kind = getattr(diffusers, name, None) if name else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(
            f"scheduler class {name!r} is not one of diffusers {diffusers.__version__}: pass the "
            "scheduler itself instead of its config."
        )
    from_config: Any = kind.from_config  # type: ignore[attr-defined]
    return from_config(dict(scheduler))
