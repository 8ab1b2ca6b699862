"""The changes told in docs/drop-in.md fit diffusers' scripts, each in exactly one place."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from tests.drop_in.changes import (
    DOCUMENT,
    FIXTURE,
    ChangeError,
    Edit,
    changed,
    edits_of,
    left_out,
    scripts,
    written,
)
from tests.drop_in.runs import RECIPES

SOURCE = os.environ.get("DIFFUSERS_SOURCE", "")
needs_source = pytest.mark.skipif(
    not SOURCE, reason="DIFFUSERS_SOURCE names no checkout of diffusers"
)
NOT_TRAINING = ("research_projects", "community")


def examples() -> Path:
    return Path(SOURCE) / "examples"


def test_the_document_tells_the_changes_of_the_fixture() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert written(text) == text, "run: python -m tests.drop_in.changes"
    assert FIXTURE["commit"] in text


def test_what_is_told_to_have_run_is_what_the_slow_tests_run() -> None:
    assert {name.split()[0] for name in RECIPES} == set(FIXTURE["ran"])
    why_not = [path for paths in FIXTURE["not_run"].values() for path in paths]
    assert sorted([*FIXTURE["ran"], *why_not]) == sorted(scripts())


def test_no_script_is_told_twice() -> None:
    assert len(set(scripts())) == len(scripts())
    assert not set(scripts()) & set(left_out())


@pytest.mark.parametrize("path", scripts())
def test_no_placeholder_is_left(path: str) -> None:
    for edit in edits_of(path):
        assert not [line for line in edit.old + edit.new if "<" in line]
        assert 1 <= len(edit.add) <= 2


@pytest.mark.parametrize("path", scripts())
def test_a_change_adds_few_lines(path: str) -> None:
    assert sum(len(edit.add) for edit in edits_of(path)) <= 4


@needs_source
@pytest.mark.parametrize("path", scripts())
def test_each_change_fits_its_script_once_and_leaves_valid_code(path: str) -> None:
    text = (examples() / path).read_text("utf-8")
    result = changed(text, edits_of(path))
    ast.parse(result)
    assert "diffusers_curriculum" in result
    with pytest.raises(ChangeError):  # it is not there a second time
        changed(result, [edit for edit in edits_of(path) if edit.remove])


@needs_source
def test_no_training_script_is_forgotten() -> None:
    found = {
        str(path.relative_to(examples()))
        for pattern in ("train_*.py", "textual_inversion*.py")
        for path in examples().rglob(pattern)
        if not set(path.parts) & set(NOT_TRAINING)
    }
    assert found == set(scripts()) | set(left_out())


@needs_source
@pytest.mark.parametrize("path", scripts())
def test_no_other_draw_of_timesteps_is_left(path: str) -> None:
    result = changed((examples() / path).read_text("utf-8"), edits_of(path))
    calls = [ast.unparse(n) for n in ast.walk(ast.parse(result)) if isinstance(n, ast.Call)]
    draws = [c for c in calls if c.startswith(("torch.randint(0,", "compute_density_for"))]
    assert draws == []


@pytest.mark.parametrize("text", ["a\nc\n", "a\nb\na\nb\n"])
def test_a_change_that_fits_nowhere_or_twice_is_refused(text: str) -> None:
    with pytest.raises(ChangeError, match="places instead of one"):
        changed(text, [Edit(before=["a"], remove=["b"], add=["x"], after=[])])


def test_a_change_is_made_where_it_fits() -> None:
    edit = Edit(before=["a"], remove=["b"], add=["x", "y"], after=["c"])
    assert changed("0\na\nb\nc\nb\n", [edit]) == "0\na\nx\ny\nc\nb\n"
    assert edit.diff() == [" a", "-b", "+x", "+y", " c"]
