"""KEY=VALUE words."""

from __future__ import annotations

import re

import pytest

from diffusers_curriculum.training.arguments.key_values import parse_key_values
from diffusers_curriculum.training.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("0.5", 0.5),
        ("-1e-3", -0.001),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("median", "median"),
        ("log_snr", "log_snr"),
        ("./law.csv", "./law.csv"),
        ("C:\\laws\\my law.csv", "C:\\laws\\my law.csv"),
        ("[[-4,0],[0,1.5],[4,0]]", [[-4, 0], [0, 1.5], [4, 0]]),
        ('[{"density": "laplace", "b": 1}]', [{"density": "laplace", "b": 1}]),
        ("{}", {}),
    ],
)
def test_values(text: str, value: object):
    got = parse_key_values("--flag", [f"key={text}"])["key"]
    assert got == value
    assert type(got) is type(value)


def test_several_and_none():
    assert parse_key_values("--flag", ["a=1", "b=x"]) == {"a": 1, "b": "x"}
    assert parse_key_values("--flag", []) == {}


@pytest.mark.parametrize(
    "piece",
    [
        "mu",
        "=1",
        "mu=",
        "1mu=2",
        "m u=1",
        "mu=1;b",
        "mu=nan",
        "mu=inf",
        "mu=[1",
        "mu=[NaN]",
        "mu=[1e999]",
        "mu={'a': 1}",
        "mu=0,5",
        "mu=" + "[" * 10**5,
        "mu=a b",
        "mu==1",
    ],
)
def test_bad_pieces_are_shown(piece: str):
    with pytest.raises(UsageError, match="--flag got " + re.escape(repr(piece))):
        parse_key_values("--flag", ["ok=1", piece])


def test_duplicates_are_refused():
    with pytest.raises(UsageError, match=r"'mu=2'.*given before"):
        parse_key_values("--flag", ["mu=1", "mu=2"])
