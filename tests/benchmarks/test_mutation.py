"""The mutants are the faults that are meant; and what is counted as killed was."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from benchmarks.mutation import __main__ as command
from benchmarks.mutation import report
from benchmarks.mutation.edits import Mutant, is_program, mutants
from benchmarks.mutation.modules import FILES, FOLDERS, PACKAGE, modules
from benchmarks.mutation.modules import tests_of as files_of
from benchmarks.mutation.report import Result
from benchmarks.mutation.sample import drawn
from benchmarks.mutation.text import Edit, Text
from benchmarks.mutation.trial import Outcome, Watch, verdict
from tests.structure.layout import FLOORS

ROOT = Path(__file__).parents[2]


def changes(source: str) -> set[str]:
    """The sources that one change makes of a source."""
    found = mutants(source, "m.py")
    return {Text(source).changed(m.edit) for m in found if is_program(m, source)}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("a < b", {"a <= b", "a >= b"}),
        ("a >= b", {"a > b", "a < b"}),
        ("a == b", {"a != b"}),
        ("a is not b", {"a is b"}),
        ("a not in b", {"a in b"}),
        ("a < b <= c", {"a <= b <= c", "a >= b <= c", "a < b < c", "a < b > c"}),
        ("a + b - c", {"a - b - c", "a + b + c"}),
        ("(a) * (b)", {"(a) / (b)"}),
        ("a // b", {"a * b"}),
        ("a & b", {"a | b"}),
        ("a and b and c", {"a or b and c", "a and b or c"}),
        ("x = not a", {"x =  a"}),
        ("-a", {"a"}),
        ("True", {"False"}),
        ("0", {"1", "-1"}),
        ("3", {"4", "2"}),
        ("0.0", {"1.0"}),
        ("3.0", {"4.0", "1.5"}),
        ("f(a, b)", {"f(a)", "pass"}),
        ("x = f(a, b=c)", {"x = f(a)"}),
        ("x = f(b=c)", {"x = f()"}),
        ("x = f(a)", set()),
        ("x = a.clamp_min(b)", {"x = a.clamp_max(b)"}),
        ("x = max(a, b)", {"x = min(a, b)", "x = max(a)"}),
        ("x = zip(a, b, strict=True)", set()),
        ("x = a if b else c", {"x = a if (not b) else c"}),
        ("def f():\n    return a", {"def f():\n    return None"}),
    ],
)
def test_changes_of_a_source(source: str, wanted: set[str]) -> None:
    assert changes(source) == wanted


@pytest.mark.parametrize(
    "source",
    [
        '"""Words 1 < 2."""',
        'raise ValueError(f"{a + 1}", 1)',
        "x = f'{a + 1}'",
        "x: Literal[1]",
        "def f(x: Literal[1]) -> Literal[2]: pass",
        "@register(1, note=2)\n@dataclass(frozen=True)\nclass A: pass",
        "x = Entry(1, note=2)",
        "isinstance(a, int | float)",
        "logger.warning('a', 1)",
        "x = int | None",
        "import a.b as c",
        "def f():\n    return None",
    ],
)
def test_what_is_only_said_is_left_alone(source: str) -> None:
    assert changes(source) - {"pass"} == set()


def test_what_does_not_parse_or_is_the_same_is_no_mutant() -> None:
    source = "f((a), b)"
    broken = Mutant("m.py", Edit(4, 8, ""), "argument", 1, source, "")
    same = Mutant("m.py", Edit(2, 5, "a"), "argument", 1, source, "")
    assert not is_program(broken, source)
    assert not is_program(same, source)


def test_a_mutant_knows_its_line_whatever_stands_before() -> None:
    source = '"""Gr\u00f6\u00dfe."""\n\nx = (\n    a\n    + b\n)\n'
    (mutant,) = mutants(source, "m.py")
    assert (mutant.line, mutant.before, mutant.after) == (5, "+ b", "- b")
    assert Text(source).changed(mutant.edit) == source.replace("+", "-")


def test_a_sample_is_repeatable_and_grows() -> None:
    sources = {"a.py": "x = 1 + 2 < 3", "b.py": "y = f(1, b=2)"}
    small, count = drawn(sources, 3, seed=1)
    large, _ = drawn(sources, 100, seed=1)
    assert (len(small), small) == (3, large[:3])
    assert len(set(large)) == len(large) == count
    assert {m.path for m in large} == set(sources)
    assert drawn(sources, 100, seed=2)[0] != large


def test_all_modules_of_floors_0_to_2_are_mutated() -> None:
    assert {*FILES, *FOLDERS} == {name for name, floor in FLOORS.items() if floor <= 2}
    names = modules(ROOT)
    assert {"randomness", "densities/laws", "samplers/base"} <= set(names)
    assert modules(ROOT, ["weighting", "pacing"]) == ["pacing", *modules(ROOT, ["weighting"])]
    with pytest.raises(ValueError, match="'training'"):
        modules(ROOT, ["training"])


@pytest.mark.parametrize("module", modules(ROOT))
def test_every_module_has_tests_that_exist_and_its_own_come_first(module: str) -> None:
    files = files_of(module, ROOT)
    assert len(set(files)) == len(files) > 0
    assert all((ROOT / file).is_file() for file in files)
    first, _, last = module.partition("/")
    named = f"tests/{first}/test_{last}.py" if last else f"tests/test_{first}.py"
    assert files[0] == named or not (ROOT / named).exists()


@pytest.mark.parametrize(
    ("status", "failed", "spent", "wanted"),
    [
        (0, "", False, ("survived", "")),
        (1, "t::a", False, ("killed", "t::a")),
        (2, "t::a", True, ("killed", "t::a")),
        (2, "", True, ("unfinished", "")),
        (4, "", False, ("killed", "status 4 of pytest")),
    ],
)
def test_verdicts(status: int, failed: str, spent: bool, wanted: tuple[str, str]) -> None:
    watch = Watch(1.0)
    watch.failed, watch.spent = failed, spent
    assert verdict(status, watch) == wanted


def test_no_tests_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="no test"):
        verdict(5, Watch(1.0))


def results() -> list[Result]:
    found = mutants("x = a + b < c", "m.py")
    outcomes = [Outcome("killed", "t::a", 1.0), Outcome("survived", "", 2.0)]
    return [Result(m, o) for m, o in zip(found, [*outcomes, *outcomes], strict=False)]


def test_figures_with_and_without_equivalent_mutants() -> None:
    three = results()
    assert [r.killed for r in three] == [True, False, True]
    plain = report.summary(three, {})
    assert (plain.total, plain.killed, plain.share) == (3, 2, 2 / 3)
    assert plain.share_of_faults == plain.share
    assert plain.survivors == [three[1]]
    # a killed mutant is no equivalent one, whatever the list says
    known = report.summary(three, {r.mutant.name: "why" for r in three[:2]})
    assert (known.share, known.share_of_faults) == (2 / 3, 1.0)
    assert known.equivalent == {three[1].mutant.name: "why"}
    assert known.survivors == []
    assert "2 of 3 killed: 66.7 %; 100.0 % without 1 equivalent" in known.text()
    assert "m.py:1 survived" in plain.text()


def test_a_kill_that_does_not_count() -> None:
    assert not results()[0].without_kill().killed


def test_the_document_is_read_back(tmp_path: Path) -> None:
    three, path = results(), tmp_path / "m.json"
    path.write_text(report.document(three, report.summary(three, {}), 9, "python -m x"))
    loaded = json.loads(path.read_text())
    assert (loaded["total"], loaded["killed"], loaded["candidates"]) == (3, 2, 9)
    assert report.recorded(path) == {r.mutant.name: r.outcome for r in three}


def test_every_equivalent_mutant_is_one_and_says_why() -> None:
    known = report.equivalents()
    by_path: dict[str, set[str]] = {}
    for name, reason in known.items():
        path = name.partition(": ")[0]
        if path not in by_path:
            source = (ROOT / path).read_text("utf-8")
            by_path[path] = {m.name for m in mutants(source, path)}
        assert len(reason.split()) > 5
        assert name in by_path[path], "the line has changed: look again whether it is equivalent"


def test_the_recorded_figure_is_that_of_its_mutants() -> None:
    loaded = json.loads((ROOT / "benchmarks/results/mutation.json").read_text("utf-8"))
    killed = [row for row in loaded["mutants"] if row["verdict"] == "killed"]
    assert (loaded["total"], loaded["killed"]) == (len(loaded["mutants"]), len(killed))
    assert loaded["share"] == round(len(killed) / loaded["total"], 4)
    figure = f"{len(killed)} of {loaded['total']}"
    assert figure in (ROOT / "docs/testing.md").read_text("utf-8")


def test_an_unknown_module_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["training"]) == 2
    assert "'training'" in capsys.readouterr().err


def test_a_file_is_put_back_and_nothing_compiled_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1")
    compiled = tmp_path / "__pycache__" / "a.cpython-311.pyc"
    compiled.parent.mkdir()
    with command._put(file, "x = 2"):
        assert file.read_text() == "x = 2"
        compiled.write_text("of x = 2")
    assert file.read_text() == "x = 1"
    assert not compiled.exists()


def test_no_source_of_the_package_has_an_unplaceable_change() -> None:
    for path in [f"{PACKAGE}/pacing.py", f"{PACKAGE}/weighting/formulas.py"]:
        source = (ROOT / path).read_text("utf-8")
        programs = [m for m in mutants(source, path) if is_program(m, source)]
        assert len(programs) > 50
        assert ast.parse(Text(source).changed(programs[0].edit))
