"""A flag is declared once; the parser, the checks and the records of a run follow from it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.flag import (
    COUNT,
    SETTINGS,
    Family,
    Flag,
    Need,
    key_values,
    path,
    tracked,
)
from diffusers_curriculum.training.arguments.run import CHECKPOINTS, LOOP, RUN
from diffusers_curriculum.training.errors import UsageError

SWITCHED = Need("--switch", lambda a: a.switch)
FLAGS = Family.of(
    "own",
    tracked("switch", help="on or off"),
    tracked("number", int, 3, "how many", bound=COUNT, needs=(SWITCHED,), setting="images"),
    tracked("folder", str, "here", "where", convert=path),
    tracked("pairs", str, help="what", nargs="+", convert=key_values),
    tracked("word", str, "a", "which", known=("a", "b")),
    Flag("secret", str, help="a password"),
)
LINE = CommandLine("A test.", (FLAGS, RUN, LOOP))


def parse(line: str) -> Any:
    return LINE.parse(line.split())


def test_what_was_given_is_known_whatever_its_value() -> None:
    assert parse("").given == frozenset()
    args = parse("--switch --number 3 --pairs a=1 b=x --see 0")
    assert args.given == {"switch", "number", "pairs", "seed"}
    assert (args.number, args.pairs, args.word) == (3, {"a": 1, "b": "x"}, "a")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--number 3", "--number is 3, which has no effect without --switch: add that"),
        ("--switch --number 0", "--number is 0: it must be at least 1."),
        ("--word c", "--word is 'c': choose from a, b."),
        ("--pairs a", "--pairs got 'a': write KEY=VALUE"),
    ],
)
def test_wrong_words_are_told_with_value_and_remedy(line: str, told: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(line)
    assert told in str(error.value)


def test_a_tilde_is_the_home_folder_everywhere() -> None:
    """One resolver for all flags that name files: none takes what another refuses."""
    home = os.path.expanduser("~")
    assert parse("--folder ~/x").folder == f"{home}/x"
    from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
    from diffusers_curriculum.training.tasks.text_to_image import TextToImage
    from diffusers_curriculum.training.tasks.unconditional import Unconditional

    endings = ("_dir", "_path", "_checkpoint", "_config", "dataset_name", "_model", "_weights")
    flags = {
        flag
        for task in (TextToImage, ClassConditional, Unconditional)
        for flag in task.command_line.flags
        if flag.type is str and flag.name.endswith(endings)
    }
    assert len(flags) > 10
    assert {flag.name for flag in flags if flag.convert is not path} == set()


def test_only_what_is_declared_so_is_told_to_trackers() -> None:
    args = parse("--secret xyz --pairs a=1")
    assert args.secret == "xyz"
    assert "xyz" not in str(args.tracked())
    assert args.tracked()["pairs"] == "a=1"
    assert "number" in args.tracked()


def test_a_setting_is_made_of_its_flags() -> None:
    assert parse("").of_setting("images") == {"number": 3}
    assert parse("--switch --number 7").of_setting("images") == {"number": 7}
    with pytest.raises(ValueError, match="setting='image' is none of"):
        Flag("x", setting="image")


def test_a_switch_that_could_help_is_known() -> None:
    args = parse("")
    assert args.is_open("gradient_checkpointing")
    assert not parse("--gradient_checkpointing").is_open("gradient_checkpointing")
    assert not args.is_open("no_such_switch")


def test_settings_tell_what_a_change_does() -> None:
    (flag,) = (flag for flag in CHECKPOINTS.flags if flag.name == "allow_config_change")
    assert flag.choices == tuple(SETTINGS)


def test_what_is_declared_wrongly_is_refused() -> None:
    with pytest.raises(ValueError, match=r"declared twice: .'number'."):
        CommandLine("Twice.", (FLAGS, Family.of("more", Flag("number", int))))
    with pytest.raises(ValueError, match=r"no flags: .'nothing'."):
        CommandLine("Other.", (FLAGS,), official="nothing")
    with pytest.raises(ValueError, match=r"no flags: .'nothing'."):
        CommandLine("Other.", (FLAGS,), changes={"nothing": {"default": 1}})


def test_a_flag_may_have_another_name_for_the_same_argument() -> None:
    other = CommandLine("Other.", (FLAGS,), changes={"word": {"name": "other", "default": "b"}})
    args = other.parse([])
    assert (args.word, args.flag("word"), args["word"]) == ("b", "other", "b")
    with pytest.raises(UsageError, match="--other is 'c'"):
        other.parse(["--other", "c"])
