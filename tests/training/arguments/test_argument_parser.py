"""Precedence of abbreviations, and one-line errors."""

from __future__ import annotations

import pytest

from diffusers_curriculum.training.arguments.parser import OfficialFirstParser


@pytest.fixture
def parser() -> OfficialFirstParser:
    parser = OfficialFirstParser(("--seed", "--save"), prog="train")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--save", nargs="+")
    parser.add_argument("--seed_mode")
    parser.add_argument("--see")
    parser.add_argument("--curve")
    parser.add_argument("--curve_order")
    parser.add_argument("--curve_other")
    return parser


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--seed", "--seed"),  # exact, although a longer flag starts so
        ("--see", "--see"),  # exact beats an official abbreviation
        ("--sa", "--save"),  # unique everywhere
        ("--seed_", "--seed_mode"),  # no official one
        ("--curve", "--curve"),
        ("--curve_ot", "--curve_other"),
        ("--he", "--help"),
        ("--unknown", "--unknown"),
    ],
)
def test_resolve(parser: OfficialFirstParser, given: str, meant: str):
    assert parser.resolve(given) == meant


def test_official_wins_over_new(parser: OfficialFirstParser):
    assert parser.candidates("--h") == ["--help"]
    parser.add_argument("--saving")
    assert parser.resolve("--sav") == "--save"
    assert parser.parse_args(["--sav=x"]).save == ["x"]


@pytest.mark.parametrize(
    ("prefix", "named"),
    [("--s", "--save, --see, --seed, --seed_mode"), ("--curve_o", "--curve_order, --curve_other")],
)
def test_ambiguity_lists_the_candidates(
    parser: OfficialFirstParser, capsys: pytest.CaptureFixture[str], prefix: str, named: str
):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([prefix, "1"])
    assert stop.value.code == 2
    assert f"{prefix} could be {named}" in capsys.readouterr().err


def test_words_after_the_separator_and_quoted_phrases_are_not_flags(parser: OfficialFirstParser):
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--", "--se"]).rest == ["--se"]
    assert parser.parse_args(["--save", "--a phrase in quotes"]).save == ["--a phrase in quotes"]


def test_reads_the_command_line_by_default(
    parser: OfficialFirstParser, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["train", "--sa", "x"])
    assert parser.parse_args().save == ["x"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "many"], "--seed: invalid int value: 'many'"),
        (["--sead=1"], "unrecognized arguments: --sead=1 (did you mean --seed?)"),
        (["--seed", "-1e-4"], "--seed: invalid int value: '-1e-4'"),
        (["--zzzzzz"], "unrecognized arguments: --zzzzzz\n"),
        (["--save"], "--save: expected at least one argument"),
    ],
)
def test_errors_are_short_and_exit_2(
    parser: OfficialFirstParser, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert len(text.splitlines()) == 2


def test_a_misplaced_token_is_not_printed(
    parser: OfficialFirstParser, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        parser.parse_args(["--hub_tokn", "hf_secretsecret"])
    text = capsys.readouterr().err
    assert "hf_***" in text
    assert "secret" not in text
