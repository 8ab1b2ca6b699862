"""What a sampler tells of itself: in words, of its progress, and how its law changes over a run;
and schedulers and samplers as plain, JSON-able configs, and back."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import diffusers
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.pacing import Pacing

MOMENTS = 64  # at which a law that changes with the step is looked at
GROUPS = 10
# Settings of samplers that came later: told where they are on, so that a run of an older version
# is not taken for another one.
_LATER = {"continuous": False}
_LONG = 24  # characters of a value in words


class Report(NamedTuple):
    """How far a sampler has come.

    Attributes:
        metrics: numbers for trackers, by their full names.
        shown: words for a progress bar.
        stage: of a curriculum, else 1.
    """

    metrics: dict[str, float]
    shown: dict[str, str]
    stage: int = 1


class Described(ConfigMixin, ABC):
    """A sampler, as far as it tells of itself; the defaults are those of a law that never changes.

    Attributes:
        levels: its noise levels.
        draw: how a batch is drawn.
        static_law: false where the law changes with the step or with what was observed.
        learns: whether the law follows the losses that were observed.
        stages: their number, of a curriculum.
        pacing: of a curriculum.
    """

    levels: NoiseLevels
    draw: str
    static_law: bool = True
    learns: bool = False
    stages: int = 1
    pacing: Pacing | None = None

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """This class and those derived from it, by their names in configs; without abstract ones.
        A sampler of one's own is among them once its module is imported."""
        concrete = cls is not Described and not inspect.isabstract(cls)
        own: dict[str, type[Self]] = {cls.__name__: cls} if concrete else {}
        for kind in cls.__subclasses__():
            own |= kind.kinds()
        return own

    @classmethod
    def name(cls) -> str:
        """As it is registered, else that of the class."""
        return cls.__name__

    @classmethod
    def of_run(cls, arguments: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
        """``arguments`` as they are given for a run of ``steps`` optimizer steps (None: not known)
        in those of the class, which knows no run."""
        return dict(arguments)

    @classmethod
    def upgraded_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A stored config of this version or an older one, in the words of this one: it names what
        the older one chose by a default that has changed since."""
        return dict(config)

    def version(self, step: int) -> Hashable:
        """What the law of optimizer step ``step`` is known by: tables made of it are used until it
        is another; None where it is not known, or known to a device only."""
        return 0 if self.static_law else None

    def describe(self) -> str:
        """The sampler in words, on one line: ``laplace(mu=0.0, b=0.5), floor=0.1``."""
        return self.in_words(plain_config(self) if hasattr(self, "config") else {})

    @classmethod
    def in_words(cls, config: Mapping[str, Any]) -> str:
        """A config of this class in words: its law, and the settings that are no defaults (the
        floor unless it is 0)."""
        name = str(config.get("density") or cls.name())
        told = [name + arguments_in_words(config.get("density_args"))]
        for key, parameter in inspect.signature(cls).parameters.items():
            value, default = config.get(key), 0 if key == "floor" else parameter.default
            silent = key in ("density", "seed") or default is None
            if not silent and isinstance(value, int | float | str) and value != default:
                told.append(f"{key}={value}")
        return ", ".join(told)

    def rows(self) -> dict[str, str]:
        """What a model card tells, by the names of its rows."""
        return {"Timestep density": self.describe(), "Timestep draw": self.draw}

    def metrics(self) -> dict[str, Tensor]:
        """0-dim tensors worth logging, on the device; reading them is the caller's choice."""
        return {}

    def report(self, step: int) -> Report:
        """What a progress report tells before optimizer step ``step``; numbers are read back."""
        return Report({f"sampler/{name}": float(v) for name, v in self.metrics().items()}, {})

    # -- its course over a run -------------------------------------------------------------------

    def stage(self, step: int | None = None) -> int:
        """The stage (1 to ``stages``) of optimizer step ``step``: 1 but for a curriculum."""
        return 1

    def opening(self, stage: int) -> str:
        """What to tell of a stage that was reached: since when, and what it opened."""
        return f"stage {stage} of {self.stages}"

    def stage_starts(self, steps: int) -> tuple[list[float], str]:
        """The step of a run of ``steps`` at which each stage begins (infinite: it did not), and how
        that is known, as a short text; empty where nothing changes."""
        if not self.learns:
            return [0.0], ""
        told = [v for name, v in self.metrics().items() if name.endswith("law_is_learned")]
        if told and not any(bool(share > 0) for share in told):
            return [0.0], "of the warm-up: nothing is learned yet"
        return [0.0], "as learned so far"

    def moments(self, steps: int) -> list[int]:
        """Optimizer steps of a run of ``steps`` at which to look at the law besides the stages'
        starts; one where it is the same at all of them, but for what is learned."""
        if self.static_law:
            return [0]
        return sorted({min(round(n * steps / MOMENTS), steps - 1) for n in range(MOMENTS)})

    def groups(self) -> tuple[str, Sequence[int]]:
        """What the levels are grouped by in tables, and the first index of each group."""
        count = len(self.levels)
        return "tenth", sorted({count * number // GROUPS for number in range(GROUPS)})


def describe_config(config: Any) -> str:
    """A sampler's config in words, as :meth:`Described.describe` says them; "-" for none.

    A config of an unknown class, or one that its class does not understand, as a damaged file may
    hold it, is told by its density or its class alone.
    """
    if not isinstance(config, Mapping):
        return "-"
    name = str(config.get("_class_name", "-"))
    try:
        return Described.kinds()[name].in_words(config)
    except (AttributeError, KeyError, TypeError):
        return str(config.get("density", name)) + arguments_in_words(config.get("density_args"))


def upgraded_config(config: Any) -> Any:
    """A sampler's stored config as :meth:`Described.upgraded_config` of its class gives it; what is
    no config of a known class, as it is."""
    if not isinstance(config, Mapping):
        return config
    kind = Described.kinds().get(config.get("_class_name", ""))
    return config if kind is None else kind.upgraded_config(config)


def checked_config(name: str, config: Any) -> Mapping[str, Any]:
    """``config`` if it is one; ValueError for what is neither a sampler nor a mapping."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{name}={config!r} is no sampler: give one, or its config.")
    return config


def clusters_in_words(config: Mapping[str, Any]) -> str:
    """A curriculum's config without its base: ``20 clusters, easy_to_hard, patience``."""
    method, given = config.get("clustering"), arguments_in_words(config.get("clustering_args"))
    clusters = "clusters" if method == "explicit" else f"{config.get('clusters')} clusters"
    by = "" if method == "auto" and not given else f" by {method}{given}"
    pacing = f"{config.get('pacing')}{arguments_in_words(config.get('pacing_args'))}"
    balanced = ", balanced" if config.get("within") == "balanced" else ""
    return f"{clusters}{by}, {config.get('order')}, {pacing}{balanced}"


# -- configs ---------------------------------------------------------------------------------------


def plain_config(configured: ConfigMixin) -> dict[str, Any]:
    """The config of a scheduler or sampler as plain values, its class under ``_class_name``."""
    values: dict[str, Any] = {"_class_name": type(configured).__name__}
    for key, value in configured.config.items():
        if not key.startswith("_") and not (key in _LATER and value == _LATER[key]):
            values[key] = value.tolist() if hasattr(value, "tolist") else value
    return values


def arguments_in_words(arguments: Any) -> str:
    """``(mu=0.0, b=0.5)`` of a mapping; long values are left out, and nothing is told of none."""
    if not isinstance(arguments, Mapping) or not arguments:
        return ""
    shown = (f"{k}={v if len(str(v)) < _LONG else '...'}" for k, v in arguments.items())
    return f"({', '.join(shown)})"


def build_scheduler(scheduler: Any) -> Any:
    """A scheduler from its config, an instance as it is; ValueError for a class that is not a
    scheduler of diffusers."""
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
    """The arguments of ``kind`` that a config and ``overrides`` tell; ValueError for others."""
    arguments = {k: v for k, v in config.items() if not k.startswith("_")} | dict(overrides)
    parameters = inspect.signature(kind).parameters
    unknown = sorted(arguments.keys() - parameters.keys())
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no setting {unknown[0]!r}: is it of a newer version?"
        )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise ValueError(f"the config of {kind.__name__} lacks {name!r}: add it.")
    return arguments
