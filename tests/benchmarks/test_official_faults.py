"""How the official script behaves under faults: the driver's own parts, and one cheap row."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - to see that the poison is one
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.official_faults import __main__ as command
from benchmarks.official_faults import faults, report, source, worker
from benchmarks.official_faults.report import Row, document, rows_of, table
from benchmarks.official_faults.trial import wrap
from benchmarks.official_faults.workplace import Outcome, shortened

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "official_faults.json"
SCRIPT = 'import x\ncheck_min_version("0.40.0.dev0")\nmain()\n'
ROW = Row("R16", "Does it stop?", "exit 0", "--max_train_steps 6", {"status": 0})


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    script = tmp_path / "checkout" / report.SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)
    return tmp_path / "checkout"


# -- table and JSON --------------------------------------------------------------------------------


def test_rows_survive_json_in_order() -> None:
    rows = [replace(ROW, row="R9", ran=False), ROW, replace(ROW, row="R2", numbers={})]
    text = document(rows, {"diffusers_commit": "abc"})
    assert [row.row for row in rows_of(text)] == ["R2", "R9", "R16"]
    assert set(map(repr, rows_of(text))) == set(map(repr, rows))
    assert json.loads(text)["diffusers_commit"] == "abc"


def test_the_table_holds_every_word_in_its_width() -> None:
    long = replace(ROW, official="a loss of 1.25 and then " * 9)
    lines = table([long, replace(ROW, row="R2")], widths=(12, 20, 15)).splitlines()
    assert max(map(len, lines)) <= 4 + 12 + 20 + 15 + 3 * 2
    assert [line.split()[0] for line in lines if line[0] != " "] == ["row", "---", "R2", "R16"]
    assert "\n".join(lines).count("1.25") == 9


@pytest.mark.skipif(not RESULTS.exists(), reason="not measured yet")
def test_the_stored_results_are_complete_and_name_no_machine() -> None:
    text = RESULTS.read_text("utf-8")
    told, rows = json.loads(text), rows_of(text)
    assert {row.row for row in rows} == set(report.ROWS)
    assert all(row.ran and row.what and row.official for row in rows)
    assert len(told["diffusers_commit"]) == 40
    assert told["versions"]["torch"]
    assert not [
        word for word in ("/tmp", "/home", "/work", "/root", os.uname().nodename) if word in text
    ]


# -- the script ------------------------------------------------------------------------------------


def test_only_the_version_check_is_taken_out() -> None:
    assert source.runnable(SCRIPT) == "import x\n\nmain()\n"
    for number in (0, 2):
        with pytest.raises(source.SourceError, match=f"{number} times"):
            source.runnable('check_min_version("1")\n' * number)


def test_an_unknown_script_is_not_given_a_commit(checkout: Path) -> None:
    facts = source.facts(checkout)
    assert facts["diffusers_commit"] == "unknown"
    assert facts["script_asks_for_diffusers"] == "0.40.0.dev0"


def test_a_git_checkout_gives_its_commit(checkout: Path) -> None:
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for more in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x", "--no-verify"]):
        subprocess.run([*git, *more], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert source.facts(checkout)["diffusers_commit"] == head.stdout.strip()
    inner = checkout / "inner"  # a folder inside another project's checkout is not one
    (inner / report.SCRIPT).parent.mkdir(parents=True)
    (inner / report.SCRIPT).write_text(SCRIPT)
    assert source.facts(inner)["diffusers_commit"] == "unknown"


@pytest.mark.parametrize("value", [None, "nowhere"])
def test_without_a_script_it_says_so(
    value: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIFFUSERS_SOURCE", raising=False)
    if value:
        monkeypatch.setenv("DIFFUSERS_SOURCE", value)
    assert command.main([]) == 2
    assert (value or "DIFFUSERS_SOURCE") in capsys.readouterr().err


# -- faults and what is read from a run ------------------------------------------------------------


def test_every_row_has_its_measurement() -> None:
    assert tuple(sorted(worker.MEASURES, key=lambda row: int(row[1:]))) == report.ROWS
    assert all(measure.__doc__ for measure in worker.MEASURES.values())


def test_a_measurement_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(place: object) -> None:
        """Does it?"""
        raise RuntimeError("no checkpoint")

    monkeypatch.setitem(worker.MEASURES, "R2", fails)
    (row,) = worker.measured("R2", None)  # type: ignore[arg-type]
    assert not row.ran
    assert (row.what, "no checkpoint" in row.official) == ("Does it?", True)


@pytest.mark.parametrize("name", ["a.pkl", "a.bin"])
def test_the_poison_works(tmp_path: Path, name: str) -> None:
    faults.poison(tmp_path / name, tmp_path / "canary")
    assert not (tmp_path / "canary").exists()
    if name == "a.pkl":
        pickle.loads((tmp_path / name).read_bytes())
    else:
        torch.load(tmp_path / name, weights_only=False)  # noqa: TID251
    assert (tmp_path / "canary").exists()


def test_one_bit_is_flipped(tmp_path: Path) -> None:
    before = bytes(range(100))
    (tmp_path / "x").write_bytes(before)
    faults.flip_bit(tmp_path / "x", 0.4)
    after = (tmp_path / "x").read_bytes()
    assert [i for i in range(100) if before[i] != after[i]] == [40]
    assert (before[40] ^ after[40]).bit_count() == 1


def test_a_wrapped_call_stays_as_it_is() -> None:
    class Owner:
        @classmethod
        def name(cls, suffix: str) -> str:
            return cls.__name__ + suffix

    seen: list[str] = []
    wrap(Owner, "name", seen.append)
    assert Owner.name("!") == "Owner!"
    assert seen == ["!"]


def test_the_last_error_is_told_without_folders(tmp_path: Path) -> None:
    text = "KeyError: 'a'\n12 - INFO - fine\nOSError: no /tmp/x/run-1/out/checkpoint-4 there\nbye"
    outcome = Outcome(1, text, [], tmp_path)
    assert outcome.end == "exit 1, 'OSError: no checkpoint-4 there'"
    assert Outcome(-9, "killed", [], tmp_path).end == "exit -9"
    assert len(shortened("x" * 500)) == 110


def test_warnings_of_a_log(tmp_path: Path) -> None:
    log = "d - INFO - accelerate.checkpointing - {}\nd - WARNING - diffusers - odd\nx\n"
    for line, count in (("Could not load random states", 2), ("All random states loaded", 1)):
        found = Outcome(0, log.format(line), [], tmp_path).warnings
        assert len(found) == count
        assert found[-1] == "WARNING: odd"


# -- one row ---------------------------------------------------------------------------------------


@pytest.mark.skipif("DIFFUSERS_SOURCE" not in os.environ, reason="set DIFFUSERS_SOURCE")
def test_a_row_is_measured(tmp_path: Path) -> None:
    argv = ["--only", "R16", "--json", str(tmp_path / "rows.json")]
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.official_faults", *argv],
        cwd=command.ROOT,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    (row,) = rows_of((tmp_path / "rows.json").read_text("utf-8"))
    assert row.numbers["tensors"] > 100
    assert row.row == "R16"
    assert all(word in told.stdout for word in row.official.split())
