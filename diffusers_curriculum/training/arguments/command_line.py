"""The command line of a script: its flags, what was given, and what is wrong with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from diffusers_curriculum.training.arguments.configuration import (
    CONFIG,
    configuration_of,
    read_configuration,
)
from diffusers_curriculum.training.arguments.flag import Family, Flag
from diffusers_curriculum.training.arguments.key_values import without_password
from diffusers_curriculum.training.arguments.parser import OfficialFirstParser
from diffusers_curriculum.training.errors import UsageError


class Arguments(argparse.Namespace):
    """A parsed command line: one attribute for each flag.

    Attributes:
        given: names of the arguments that the user gave, on the command line or in a file,
            whatever their value, and those of a recipe.
        by_recipe: those of a recipe alone.
        data_std: standard deviation of the data, once a run knows it.
        sources: rows of --data_config; none for images from one place.
        hub_token: for the Hub, where a flag gives one.
        configuration: the file by which a run could be started again, as plain data.
        flags: those of the command line, as they were declared.
    """

    given: frozenset[str]
    by_recipe: frozenset[str] = frozenset()
    data_std: float | None = None
    sources: tuple[Any, ...] = ()
    hub_token: str | None = None
    configuration: dict[str, Any]
    flags: tuple[Flag, ...]

    def __getitem__(self, name: str) -> Any:
        """The argument of that name."""
        return getattr(self, name)

    def flag(self, name: str) -> str:
        """The flag that an argument is given by, without dashes."""
        return next(flag.name for flag in self.flags if flag.dest == name)

    def is_open(self, name: str) -> bool:
        """Whether a flag gives that argument which is off and would do something if on."""
        switches = [flag for flag in self.flags if flag.dest == name and not getattr(self, name)]
        return any(flag.does_something(self) for flag in switches)

    def of_setting(self, setting: str) -> dict[str, Any]:
        """Name and value of all flags that are part of a setting of --allow_config_change."""
        return {f.name: getattr(self, f.dest) for f in self.flags if self._tells(f, setting)}

    def _tells(self, flag: Flag, setting: str) -> bool:
        value, unset = getattr(self, flag.dest), (None, {}, [], ())
        is_set = value not in unset and (value != flag.default or bool(flag.needs))
        told = not flag.later or (is_set and flag.does_something(self))
        return flag.setting == setting and told

    def tracked(self) -> dict[str, bool | int | float | str]:
        """What trackers and run.json may store, as scalars; unset ones are left out.

        accelerate's TensorBoard tracker writes what it gets to disk, next to the files that are
        uploaded, so a token among "all arguments" would become public.
        """
        told = {f.name: getattr(self, f.dest) for f in self.flags if f.tracked}
        return {
            name: _scalar(value) for name, value in told.items() if value not in (None, {}, [], ())
        }


class CommandLine:
    """The flags of a script.

    Args:
        description: at the top of the help.
        families: flags in the order of the help.
        official: names of the flags that diffusers' script has, with blanks between them; their
            abbreviations win over those of other flags. None: all flags.
        changes: other defaults, help, needs, ... of some flags, by their names.

    Raises:
        ValueError: a flag is declared twice, or a name in ``official`` or ``changes`` is no flag.
    """

    def __init__(
        self,
        description: str,
        families: Sequence[Family],
        *,
        official: str | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.description = description
        self.families = tuple(family.changed(changes or {}) for family in families)
        self.flags = tuple(flag for family in self.families for flag in family.flags)
        names = [flag.name for flag in self.flags]
        self.official = frozenset(names if official is None else official.split())
        twice = {name for name in names if names.count(name) > 1}
        declared = {flag.name for family in families for flag in family.flags}
        unknown = (self.official - {*names}) | ((changes or {}).keys() - declared)
        if twice or unknown:
            raise ValueError(f"declared twice: {sorted(twice)}; no flags: {sorted(unknown)}")

    def parser(self, found: Mapping[str, Any] = MappingProxyType({})) -> OfficialFirstParser:
        """The parser alone, with other defaults of some arguments; nothing is checked."""
        official = [f"--{name}" for name in self.official]
        parser = OfficialFirstParser(description=self.description, official=official)
        for family in self.families:
            group = parser.add_argument_group(family.title)
            for flag in family.flags:
                known = flag.dest in found
                more = {"default": found[flag.dest], "required": False} if known else {}
                flag.add_to(group, **more)
        return parser

    def read(self, argv: Sequence[str] | None = None) -> Arguments:
        """The words of a command line and the values of its --config as they stand there; nothing
        is converted, and only their types are checked."""
        file = self.parser().word_after("--config", argv) if CONFIG in self.flags else None
        config = read_configuration(file, self.flags)
        parser = self.parser(config.all)
        args = parser.parse_args(argv, Arguments())
        args.given, args.flags = parser.given | config.given.keys(), self.flags
        return args

    def parse(
        self,
        argv: Sequence[str] | None = None,
        settle: Callable[[Arguments], object] = lambda args: None,
        *,
        machine: bool = True,
    ) -> Arguments:
        """Parse and check a command line (default: the program's own), before any model is loaded.

        Args:
            settle: puts defaults that depend on one another, before the families put theirs.
            machine: also look for files, packages and devices.

        Raises:
            UsageError: an argument is wrong, missing or without effect; the message says what to
                do.
            SystemExit: status 2 for what argparse itself refuses, with a message on stderr.
        """
        args = self.read(argv)
        for flag in self.flags:
            if flag.convert is not None:
                setattr(args, flag.dest, flag.convert(f"--{flag.name}", getattr(args, flag.dest)))
            flag.check(getattr(args, flag.dest))
        args.configuration = configuration_of(vars(args), args.given, self.flags)
        for hook in self._hooks("expand"):
            hook(args)
        settle(args)
        for hook in self._hooks("settle"):
            hook(args)
        for flag in self.flags:
            _refuse_without_effect(args, flag)
        for hook in (*self._hooks("check"), *(self._hooks("check_machine") if machine else ())):
            hook(args)
        return args

    def _hooks(self, name: str) -> Iterator[Callable[[Arguments], object]]:
        hooks = (getattr(family, name) for family in self.families)
        return (hook for hook in hooks if hook is not None)


def _refuse_without_effect(args: Arguments, flag: Flag) -> None:
    value = getattr(args, flag.dest)
    if flag.dest not in args.given - args.by_recipe or value is False:
        return
    for need in flag.needs:
        if not need.holds(args):
            raise UsageError(
                f"--{flag.name} is {_shown(value)}, which has no effect without {need.told}: add "
                f"that, or drop --{flag.name}."
            )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    return "set" if value is True else str(value)


def _scalar(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | float):
        return value
    return without_password(_shown(value))
