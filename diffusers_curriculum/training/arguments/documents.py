"""JSON and YAML files of plain data, in which each name stands once."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from diffusers_curriculum.training.errors import UsageError

_CORE = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9]\d*)",
    "float": r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Core(yaml.SafeLoader):
    """YAML by the core schema of its version 1.2, in which `no` is a word and 1e-4 a number."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _refuse_twice(self.construct_object(key, deep=True) for key, _ in node.value)
        return super().construct_mapping(node, deep)


for _kind, _words in _CORE.items():
    _Core.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_words})\Z"), None)


def read_document(flag: str, name: str) -> Any:
    """What a file holds, given to ``flag``; its ending says whether it is JSON or YAML.

    Raises:
        UsageError: another ending, a file that cannot be read, one that is neither, or a name that
            stands twice in it.
    """
    form = Path(name).suffix.lower()
    if form not in (".json", ".yaml", ".yml"):
        raise UsageError(f"{flag} is {name}: give a file that ends in .json or .yaml.")
    try:
        text = Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} is {name}, which cannot be read: {error}.") from error
    try:
        if form == ".json":
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, _Core)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        kind = "JSON" if form == ".json" else "YAML"
        raise UsageError(f"{flag} is {name}, which is not {kind}: {told}.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice(name for name, _ in pairs)
    return dict(pairs)


def _refuse_twice(names: Iterable[Any]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{name!r} stands there {count} times, give it once")
