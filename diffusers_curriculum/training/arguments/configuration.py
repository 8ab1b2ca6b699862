"""--config: the flags of a run in a file, and the file that a run leaves of its own."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_curriculum.training.arguments.flag import Flag
from diffusers_curriculum.training.arguments.key_values import without_password
from diffusers_curriculum.training.errors import UsageError

DEFAULTS = "defaults"
CONFIG = Flag(
    "config",
    str,
    help="YAML or JSON file of flags by their names; those of the command line win "
    "(docs/configuration.md)",
    metavar="FILE",
    tracked=True,
)


class Configuration(NamedTuple):
    """Values of a file by the names of arguments: those that it gives, and what others are by
    default."""

    given: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def all(self) -> dict[str, Any]:
        """What arguments are where the command line does not say."""
        return self.defaults | self.given


def read_configuration(name: str | None, flags: Sequence[Flag]) -> Configuration:
    """The values of ``flags`` in the file ``name``; null stands for a flag that is not given.

    Raises:
        UsageError: a file that cannot be read, a name that is no flag, a value that the flag does
            not take, or a flag that stands there twice.
    """
    if name is None:
        return Configuration({}, {})
    from diffusers_curriculum.training.arguments.documents import read_document  # few ask for it

    where, content = f"--config {name}", read_document("--config", name)
    given, defaults = content, {}
    if isinstance(content, dict):
        given = {key: value for key, value in content.items() if key != DEFAULTS}
        defaults = content.get(DEFAULTS) or {}
    if not isinstance(given, dict) or not isinstance(defaults, dict):
        raise UsageError(f"{where} holds no names and values of flags, such as resolution: 512.")
    return Configuration(*(_values(where, part, flags) for part in (given, defaults)))


def _values(where: str, part: Mapping[Any, Any], flags: Sequence[Flag]) -> dict[str, Any]:
    declared = {flag.name: flag for flag in flags if flag != CONFIG}
    for name in part:
        if name not in declared:
            near = difflib.get_close_matches(str(name), declared, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"{where} has {name!r}, which is no flag of this script{hint}.")
    found = [declared[name] for name, value in part.items() if value not in (None, [])]
    for dest, count in Counter(flag.dest for flag in found).items():
        if count > 1:
            both = " and ".join(flag.name for flag in found if flag.dest == dest)
            raise UsageError(f"{where} has {both}, which are the same: drop one of them.")
    return {flag.dest: flag.from_file(where, part[flag.name]) for flag in found}


def configuration_of(
    values: Mapping[str, Any], given: frozenset[str], flags: Sequence[Flag]
) -> Any:
    """The file by which a run could be started again: what was given, and under "defaults" all
    other flags. Only what trackers may see is in it.

    Args:
        values: of arguments, before any of them has put others.
        given: names of those that were given.
    """
    told = {flag.dest: flag for flag in reversed(flags) if flag.tracked and flag != CONFIG}
    names = {dest: told[dest].name for dest in reversed(told)}
    own = {names[dest]: _plain(values[dest]) for dest in names if dest in given}
    others = {names[dest]: _plain(values[dest]) for dest in names if dest not in given}
    return own | {DEFAULTS: others}


def written(document: Mapping[str, Any]) -> str:
    """A configuration as YAML."""
    import yaml  # few ask for it

    program = Path(sys.argv[0]).name
    return f"# as {program} ran; again by --config with this file\n" + yaml.safe_dump(
        dict(document), sort_keys=False, allow_unicode=True
    )


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return without_password(value) if isinstance(value, str) else value
