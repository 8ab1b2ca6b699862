"""Two gloo processes: a fault or a stop request on one of them counts for both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two gloo processes saw, each with a fault of its own."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.guard_driver"]
    files = [folder / f"{rank}.json" for rank in range(2)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(file)],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "".join(errors)[-3000:]
    return [json.loads(file.read_text()) for file in files]


def test_a_fault_on_one_process_stops_the_update_on_both(reports: list[Any]) -> None:
    assert [report["processes"] for report in reports] == [2, 2]
    for report in reports:
        bits = [step["bits"] for step in report["skip"]["steps"]]
        changed = [after != before for before, after in pairwise(bits)]
        assert changed == [True, False, True, False, True]
        assert [not step["left_out"] for step in report["skip"]["steps"]] == [True, *changed]
        # in step 4 the gradients are sound: only the exchange of the losses can have told
        assert [step["gradients"] for step in report["skip"]["steps"]] == [
            *(True, True, False),
            *(True, True, True),
        ]
        assert report["skip"]["skipped"] == 2
    assert reports[0]["skip"] == reports[1]["skip"]


def test_both_processes_raise_after_the_same_step(reports: list[Any]) -> None:
    assert [report["raised"] for report in reports] == [[3, 4, 5, 6]] * 2


def test_both_processes_stop_where_one_was_told_to(reports: list[Any]) -> None:
    assert [report["signal"] for report in reports] == [[4, 143]] * 2
    assert reports[0]["clock"] == reports[1]["clock"]
    step, status = reports[0]["clock"]
    assert 1 < step < 8
    assert status == 0
