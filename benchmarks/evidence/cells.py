"""What is measured: cells of a task, a target, a method and a setting, each known by its hash."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from diffusers_curriculum import TimestepSampler

PLACE = Path(__file__).parent
VERSION = 1  # of the bed: raised with every change that changes its numbers
# What holds unless a task, a tier or a group of cells says otherwise.
SETTINGS: dict[str, Any] = {
    "width": 256,
    "blocks": 4,
    "steps": 4000,
    "seeds": 5,
    "first_seed": 0,
    "batch": 128,
    "learning_rate": 1e-3,
    "average": 0.998,
    "class_dropout": 0.1,
    "first_checkpoint": 500,
    "checkpoint_factor": 2**0.5,
    "samples": 2000,
    "sampling_steps": [50],
    "guidance": [1.0],
}


class ConfigError(ValueError):
    """A config file that is missing or says what it cannot; the message names it."""


@dataclass(frozen=True)
class Cell:
    """One method on one task and target, all its seeds.

    Attributes:
        task, target, method: names of config files.
        settings: :data:`SETTINGS`, as the task, the tier and its group have them.
        group: name of a group whose settings are unusual: "learning_rate=0.002".
    """

    task: str
    target: str
    method: str
    settings: Mapping[str, Any] = field(hash=False)
    group: str = ""

    @property
    def name(self) -> str:
        """``digits/linear_v/laplace_1_1``, and what its group of cells is called, if anything."""
        return "/".join(filter(None, [self.task, self.target, self.method, self.group]))

    @property
    def held_out(self) -> bool:
        """Whether the task is kept aside until no method is changed any more."""
        return bool(config("tasks", self.task).get("held_out"))

    def config(self) -> dict[str, Any]:
        """Everything the result depends on."""
        parts = {kind: config(f"{kind}s", getattr(self, kind)) for kind in _PARTS}
        if "network" in parts["task"]:
            parts["network"] = config("networks", parts["task"]["network"])
        learned = sources(parts["method"]["sampler"])
        return {"version": VERSION, **parts, "settings": dict(self.settings), "sources": learned}

    def file(self) -> str:
        """Name of the result: the hash of the config, after words to find it by."""
        return f"{self.task}-{self.target}-{self.method}-{digest(self.config())}.json"

    def checkpoints(self) -> list[int]:
        """Steps at which is measured: a geometric row that ends with the last step."""
        steps, at = self.settings["steps"], float(self.settings["first_checkpoint"])
        found: list[int] = []
        while at < steps * 0.99:
            found.append(round(at))
            at *= self.settings["checkpoint_factor"]
        return [*found, steps]


_PARTS = ("task", "target", "method")


def digest(value: Any) -> str:
    """12 hexadecimal digits of a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@cache
def config(kind: str, name: str) -> dict[str, Any]:
    """A file of tasks/, targets/, methods/ or tiers/.

    Raises:
        ConfigError: there is none of that name.
    """
    file = PLACE / kind / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.json")))
        raise ConfigError(f"there is no {kind[:-1]} {name!r}: choose from {known}.")
    return json.loads(file.read_text("utf-8"))


def names(kind: str) -> list[str]:
    """The files of a folder."""
    return sorted(path.stem for path in (PLACE / kind).glob("*.json"))


def sources(sampler: Mapping[str, Any]) -> dict[str, str]:
    """Hash of the code of each learning sampler that a config names: a law that is found while it
    trains is what its module does, and a result of an older one is no result of this one."""
    found: dict[str, str] = {}
    if "_class_name" in sampler:
        kind = TimestepSampler.kind_of(sampler)
        if kind.learns:
            code = inspect.getsource(inspect.getmodule(kind) or kind)
            found[kind.__name__] = digest(ast.dump(ast.parse(code)))
    bases = [sampler["base"]] if "base" in sampler else []
    for inner in [*bases, *(phase["sampler"] for phase in sampler.get("phases", []))]:
        found |= sources(inner)
    return found


def cells_of(tier: str) -> list[Cell]:
    """The cells of a tier, each once."""
    plan = config("tiers", tier)
    found = [cell for group in plan["cells"] for cell in _group(group, plan.get("settings", {}))]
    return list({cell.file(): cell for cell in found}.values())


def _group(group: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[Cell]:
    given = dict(common) | group.get("settings", {})
    unknown = sorted(given.keys() - SETTINGS.keys())
    if unknown:
        raise ConfigError(
            f"cells have no setting {unknown[0]!r}: choose from {', '.join(SETTINGS)}."
        )
    for task, target, method in product(group["tasks"], group["targets"], group["methods"]):
        own = SETTINGS | config("tasks", task).get("settings", {}) | given
        yield Cell(task, target, method, own, group.get("as", ""))


def chosen(cells: list[Cell], only: str | None, held_out: bool) -> list[Cell]:
    """Those whose name fits a pattern; of tasks that are kept aside where they are asked for.

    Raises:
        ConfigError: none is left.
    """
    fitting = [cell for cell in cells if only is None or fnmatch(cell.name, only)]
    if not fitting:
        some = ", ".join(cell.name for cell in cells[:3])
        raise ConfigError(f"--only {only!r} fits no cell: they are called {some}, ...")
    return [cell for cell in fitting if held_out or not cell.held_out]
