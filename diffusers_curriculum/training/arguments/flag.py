"""A flag, declared once: the parser, the checks, the records of a run and the docs follow from it.

Importing this module loads no model code, as a wrong command line is told at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from diffusers_curriculum.training.arguments.key_values import LARGEST, parse_key_values
from diffusers_curriculum.training.errors import UsageError, usage_errors

# What a run may not change unnoticed when it is resumed: names for --allow_config_change, and what
# a change does. A flag says by `setting` which of them it is part of.
SETTINGS = {
    "seed": "another order of the data and other draws from here on",
    "global_batch": "another place in the data: samples of this epoch may repeat or be left out",
    "dataset": "another order of the data: samples of this epoch may repeat or be left out",
    "model": "the network comes from the checkpoint, the frozen models from the new base model",
    "adapter": "its weights come from the checkpoint, and must fit; the new numbers hold from here",
    "schedule": "the network meets other noise levels; sampler and loss statistics start afresh",
    "prediction_type": "the network has to learn another target",
    "sampler": "the new sampler starts afresh, a curriculum at its first stage",
    "loss_weighting": "losses are weighted in the new way from here on",
    "objective": "noise is made in the new way from here on",
    "images": "images and captions are prepared in the new way from here on",
    "optimizer": "moments and position in the schedule stay, the new numbers hold from here on",
    "compile": "results are rounded in the new way from here on",
    "imports": "a name may stand for another law or weight from here on",
    "ema": "the average stays, the new numbers hold from here on; new averages start afresh",
}


@dataclass(frozen=True)
class Bound:
    """A range that numbers must lie in; a NaN lies in none."""

    wanted: str
    holds: Callable[[float], bool]


def at_least(least: int) -> Bound:
    """Numbers from ``least`` on."""
    return Bound(f"at least {least}", lambda x: x >= least)


COUNT = at_least(1)
FROM_ZERO = at_least(0)
NOT_NEGATIVE = Bound("finite and not negative", lambda x: 0 <= x < math.inf)
ABOVE_ZERO = Bound("greater than 0", lambda x: x > 0)
POSITIVE = Bound("finite and above 0", lambda x: 0 < x < math.inf)
SHARE = Bound("in [0, 1]", lambda x: 0 <= x <= 1)
SEED = Bound("in [0, 2^32)", lambda x: 0 <= x < 2**32)
DECAY = Bound("in [0, 1)", lambda x: 0 <= x < 1)

# The largest whole numbers of what memory and time are taken for. What is only counted (steps,
# epochs) costs nothing, and ends at LARGEST.
LEVELS = 1_000_000  # of a table of noise levels, which takes 100 bytes for each; steps of a sampler
SIDE = 16_384  # pixels; Pillow takes images of more than that squared for an attack
BATCH = 2**20  # samples at once


@dataclass(frozen=True)
class Need:
    """A condition under which a flag does something.

    Attributes:
        told: what to give for it, after "no effect without".
    """

    told: str
    holds: Callable[[Any], bool]


def path(flag: str, value: Any) -> Any:
    """A name or path, ``~`` for the home folder."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def key_values(flag: str, value: Any) -> dict[str, Any]:
    """KEY=VALUE words, or names and values of a file, as a dict."""
    if not isinstance(value, dict):
        return parse_key_values(flag, value or ())
    with usage_errors(flag):
        json.dumps(value, allow_nan=False)
    return value


def truth(word: str) -> bool:
    """A word that says yes or no."""
    answers = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if word.lower() not in answers:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return answers[word.lower()]


# What a flag is in a file, by its type
_IN_FILES: dict[Any, tuple[Any, str]] = {
    None: (bool, "true or false"),
    truth: (bool, "true or false"),
    str: (str, "a text"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    key_values: (dict, "names and values"),
}


@dataclass(frozen=True)
class Flag:
    """One flag of a command line.

    Attributes:
        name: without dashes.
        type: of its words; None for a switch, which is off by default.
        help: what it does; the default is added.
        dest: name of the argument, where it is not the flag's.
        nargs, choices, metavar, required: as in argparse.
        known: words that it may be, told by this package where argparse takes any.
        bound: of a number, or of each of several.
        most: the largest whole number.
        convert: ``(flag, words) -> value``, such as :func:`path`.
        needs: conditions without which it must not be given.
        setting: the key of :data:`SETTINGS` that it is part of; None may change freely.
        later: whether it is younger than checkpoints that can be resumed: facts tell of it only
            where it does something, and without needs only where it is not at its default.
        tracked: whether trackers and run.json may tell its value. Each of these is allowed on
            purpose, so that a secret cannot slip in.
    """

    name: str
    type: Callable[[str], Any] | None = None
    default: Any = None
    help: str = ""
    dest: str = ""
    nargs: str | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    required: bool = False
    known: tuple[str, ...] | None = None
    bound: Bound | None = None
    most: int = LARGEST
    convert: Callable[[str, Any], Any] | None = None
    needs: tuple[Need, ...] = ()
    setting: str | None = None
    later: bool = False
    tracked: bool = False

    def __post_init__(self) -> None:
        if self.setting is not None and self.setting not in SETTINGS:
            raise ValueError(f"--{self.name}: setting={self.setting!r} is none of {[*SETTINGS]}.")
        object.__setattr__(self, "dest", self.dest or self.name)
        if self.type is None:
            object.__setattr__(self, "default", bool(self.default))

    def does_something(self, args: Any) -> bool:
        """Whether all that it needs is given."""
        return all(need.holds(args) for need in self.needs)

    def add_to(self, group: Any, **changes: Any) -> None:
        """Declare it to argparse."""
        if self.type is None:
            settings: dict[str, Any] = {"action": "store_true"}
        else:
            settings = {"type": self.type, "default": self.default, "nargs": self.nargs}
            settings |= {"choices": self.choices, "metavar": self.metavar}
        if self.required:
            settings["required"] = True
        group.add_argument(f"--{self.name}", help=self.help, dest=self.dest, **settings | changes)

    def check(self, value: Any) -> None:
        """Refuse a number out of range and an unknown word."""
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            self._check_one(each)

    def from_file(self, where: str, value: Any) -> Any:
        """A value that stands in a file, ``where`` it is, as words of a command line would give it.

        Raises:
            UsageError: a value of another type, or one that is refused on the command line, too.
        """
        several = self.nargs is not None and self.convert is not key_values
        words = value if several and isinstance(value, list) else [value]
        for word in words:
            self._check_in_file(where, word)
        if several != isinstance(value, list):
            raise UsageError(f"{where} has {self.name}={value!r}: give a list.")
        if self.type is None or self.convert is key_values:
            return value
        try:
            found = [self.type(str(word)) for word in words]
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"{where} has {self.name}={value!r}: {error}.") from error
        return found if several else found[0]

    def _check_in_file(self, where: str, word: Any) -> None:
        kind, wanted = _IN_FILES.get(
            key_values if self.convert is key_values else self.type,
            ((str, int, float), str(self.metavar)),
        )
        if not isinstance(word, kind) or (kind is not bool and isinstance(word, bool)):
            raise UsageError(f"{where} has {self.name}={word!r}: give {wanted}.")
        if self.choices is not None and word not in self.choices:
            known = ", ".join(self.choices)
            raise UsageError(f"{where} has {self.name}={word!r}: choose from {known}.")
        try:
            self._check_one(word)
        except UsageError as error:
            raise UsageError(f"{where}: {str(error).removeprefix('--')}") from error

    def _check_one(self, value: Any) -> None:
        if self.bound is not None and not self.bound.holds(value):
            raise UsageError(f"--{self.name} is {value}: it must be {self.bound.wanted}.")
        if isinstance(value, int) and value > self.most:
            raise UsageError(f"--{self.name} is {value}: it must be at most {self.most:,}.")
        if self.known is not None and value not in self.known:
            raise UsageError(f"--{self.name} is {value!r}: choose from {', '.join(self.known)}.")


tracked = partial(Flag, tracked=True)


def count(name: str, default: int | None = None, help: str = "", **settings: Any) -> Flag:
    """A flag for a whole number from 1 on."""
    return tracked(name, int, default, help, bound=COUNT, **settings)


def choice(
    name: str, choices: tuple[str, ...], default: Any = None, help: str = "", **settings: Any
) -> Flag:
    """A flag for one of some words."""
    return tracked(name, str, default, help, choices=choices, **settings)


def place(name: str, default: str | None = None, help: str = "", **settings: Any) -> Flag:
    """A flag for a file, a folder, or a name on the Hub."""
    return tracked(name, str, default, help, convert=path, **settings)


def pairs(name: str, help: str, **settings: Any) -> Flag:
    """A flag for names and their values, as a dict."""
    words = {"metavar": "KEY=VALUE", "nargs": "+", "convert": key_values}
    return tracked(name, str, help=help, **words, **settings)


def sharing(
    *flags: Flag, needs: Need | None = None, setting: str | None = None
) -> tuple[Flag, ...]:
    """Flags that all have ``needs`` besides their own, and ``setting`` unless they name another."""
    shared = () if needs is None else (needs,)
    return tuple(
        replace(flag, needs=(*shared, *flag.needs), setting=flag.setting or setting)
        for flag in flags
    )


@dataclass(frozen=True)
class Family:
    """Flags that belong together, and what depends on one another among them.

    Attributes:
        title: in the help.
        expand: puts the flags that one of them stands for, before anything else is looked at.
        settle: puts defaults that depend on others, before needs are looked at.
        check: refuses what cannot be, given all arguments.
        check_machine: refuses what this machine cannot serve: files, packages, devices.
    """

    title: str
    flags: tuple[Flag, ...]
    expand: Callable[[Any], object] | None = None
    settle: Callable[[Any], object] | None = None
    check: Callable[[Any], object] | None = None
    check_machine: Callable[[Any], object] | None = None

    @classmethod
    def of(
        cls,
        title: str,
        *flags: Flag,
        needs: Need | None = None,
        setting: str | None = None,
        **hooks: Any,
    ) -> Family:
        """A family whose flags share ``needs`` and ``setting``; see :func:`sharing`."""
        return cls(title, sharing(*flags, needs=needs, setting=setting), **hooks)

    def changed(self, changes: Mapping[str, Mapping[str, Any] | None]) -> Family:
        """The family with other defaults, help, needs, ... of some flags, by their names; under
        another name a flag gives the same argument, and None leaves one out."""
        own = ((flag, changes.get(flag.name, {})) for flag in self.flags)
        kept = (replace(flag, **change) for flag, change in own if change is not None)
        return replace(self, flags=tuple(kept))
