"""Schedulers and samplers as plain, JSON-able configs, and back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin

# Settings of samplers that came later: told where they are on, so that a run of an older version
# is not taken for another one.
_LATER = {"continuous": False}
_LONG = 24  # characters of a value in words


def plain_config(configured: ConfigMixin) -> dict[str, Any]:
    """The config of a scheduler or sampler as plain values, its class under ``_class_name``."""
    values = {
        k: v
        for k, v in configured.config.items()
        if not k.startswith("_") and not (k in _LATER and v == _LATER[k])
    }
    values = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}
    return {"_class_name": type(configured).__name__, **values}


def arguments_in_words(arguments: Any) -> str:
    """``(mu=0.0, b=0.5)`` of a mapping; long values are left out, and nothing is told of none."""
    if not isinstance(arguments, Mapping) or not arguments:
        return ""
    shown = (f"{k}={v if len(str(v)) < _LONG else '...'}" for k, v in arguments.items())
    return f"({', '.join(shown)})"


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


def checked_arguments(
    kind: type, config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of ``kind`` that a config and ``overrides`` tell.

    Raises:
        ValueError: an unknown key.
    """
    arguments = {k: v for k, v in config.items() if not k.startswith("_")} | dict(overrides)
    unknown = sorted(arguments.keys() - inspect.signature(kind).parameters.keys())
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no setting {unknown[0]!r}: is it of a newer version?"
        )
    return arguments
