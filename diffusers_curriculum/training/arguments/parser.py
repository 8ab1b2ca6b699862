"""An argument parser that keeps every abbreviation of the official script alive."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from diffusers_curriculum.training.arguments.flag import truth
from diffusers_curriculum.training.errors import ExitCode, tell_launcher

# argparse before Python 3.14 takes -1e-4 for a flag.
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)
_TOKEN = re.compile(r"hf_\w+")


class ShowDefaults(argparse.HelpFormatter):
    """Ends each help line with the default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = any(action.default is none for none in (None, False, argparse.SUPPRESS))
        return text if silent else f"{text} (default %(default)s)"


class _Noted(argparse.Action):
    """Notes that a flag stood there; no default is noted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "default": argparse.SUPPRESS})

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, True)


class OfficialFirstParser(argparse.ArgumentParser):
    """Resolves a flag: exact match, else unique among the official ones, else unique among all.

    New flags therefore never make an abbreviation ambiguous that the official script accepts.

    Args:
        official: flags of the official script; ``--help`` is one as well.

    Attributes:
        given: names of the arguments that stood on the last command line that was parsed.
    """

    def __init__(self, official: Collection[str] = (), **kwargs: Any) -> None:
        # Abbreviations are expanded by `resolve`; argparse's own expansion knows no precedence.
        super().__init__(allow_abbrev=False, formatter_class=ShowDefaults, **kwargs)
        self._negative_number_matcher = _NEGATIVE_NUMBER
        self._official = frozenset(official) | {"--help", "-h"}
        self.given: frozenset[str] = frozenset()

    def candidates(self, prefix: str) -> list[str]:
        """The flags that ``prefix`` may stand for: one entry when it is unambiguous."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        if prefix in flags:
            return [prefix]
        matches = [flag for flag in flags if flag.startswith(prefix)]
        official = [flag for flag in matches if flag in self._official]
        return official if len(official) == 1 else matches

    def resolve(self, prefix: str) -> str:
        """The full flag behind ``prefix``; an unknown one comes back as it is.

        An ambiguous one ends the program with status 2 and a message that lists the candidates.
        """
        matches = self.candidates(prefix)
        if len(matches) > 1:
            self.error(f"ambiguous option: {prefix} could be {', '.join(sorted(matches))}")
        return matches[0] if matches else prefix

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's, after abbreviations have been expanded; ``--switch=false`` is known, too,
        which a file may have turned on."""
        words, switched = self._switched(self._expand(sys.argv[1:] if args is None else args))
        parsed = super().parse_known_args(words, namespace)
        for name, value in switched.items():
            setattr(parsed[0], name, value)
        self.given = self._given(words)
        return parsed

    def word_after(self, flag: str, args: Sequence[str] | None = None) -> str | None:
        """The word that is given to a flag, whatever else is wrong; None where there is none."""
        silent = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        silent.add_argument(flag, nargs="?", dest="word")
        return silent.parse_known_args(self._expand(sys.argv[1:] if args is None else args))[0].word

    def _switched(self, words: Sequence[str]) -> tuple[list[str], dict[str, bool]]:
        """The words with ``--switch`` for ``--switch=false``, and what switches are; the last one
        wins."""
        kept, switched = [], {}
        for word in words:
            flag, equals, value = word.partition("=")
            action = self._option_string_actions.get(flag)
            if isinstance(action, argparse._StoreTrueAction):
                try:
                    switched[action.dest] = truth(value) if equals else True
                except argparse.ArgumentTypeError as error:
                    self.error(f"argument {flag}: {error}")
                word = flag
            kept.append(word)
        return kept, switched

    def _given(self, words: Sequence[str]) -> frozenset[str]:
        """The arguments that words of a valid command line give: what a second parse without
        defaults finds."""
        silent = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        silent._negative_number_matcher = _NEGATIVE_NUMBER
        for flag, action in self._option_string_actions.items():
            silent.add_argument(flag, dest=action.dest, nargs=action.nargs, action=_Noted)
        return frozenset(vars(silent.parse_known_args(words)[0]))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's, with a suggestion for a mistyped flag."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggest(unknown)}")
        return known

    def error(self, message: str) -> NoReturn:
        """Print one line, not ninety flags of usage, and exit with status 2."""
        # A token that was misplaced on the command line must not reach a log file.
        message = _TOKEN.sub("hf_***", message)
        tell_launcher(f"error: {message}")
        self.exit(ExitCode.USAGE, f"{self.prog}: error: {message}\n(--help lists all options)\n")

    def _expand(self, args: Sequence[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        return [self._expand_one(arg) for arg in args[:end]] + list(args[end:])

    def _expand_one(self, arg: str) -> str:
        if not arg.startswith("--"):
            return arg
        flag, equals, value = arg.partition("=")
        return self.resolve(flag) + equals + value

    def _suggest(self, unknown: Sequence[str]) -> str:
        mistyped = [arg.partition("=")[0] for arg in unknown if arg.startswith("--")]
        near = [difflib.get_close_matches(arg, self._option_string_actions, 1) for arg in mistyped]
        names = [match for matches in near for match in matches]
        return f" (did you mean {', '.join(names)}?)" if names else ""
