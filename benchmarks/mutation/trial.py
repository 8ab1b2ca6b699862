"""Tests run in a process forked from this one, in a copy of the tree."""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Imported once, before any fork; the package and its tests never, or a fork would not see changes.
LIBRARIES = (
    "torch",
    "pytest",
    "diffusers.schedulers",
    "diffusers.training_utils",
    "hypothesis.strategies",
    "mpmath",
    "safetensors.torch",
    "scipy.integrate",
    "scipy.interpolate",
    "scipy.optimize",
    "scipy.stats",
    "transformers",
    "PIL.Image",
)
# Read once, when the libraries are imported; the tests' own conftest comes too late for a fork.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
COPIED = (
    "benchmarks",
    "diffusers_curriculum",
    "docs",
    "tests",
    "pyproject.toml",
    "README.md",
    "train_text_to_image_curriculum.py",
)
# Nobody asserts in the libraries that are imported before pytest could rewrite them.
EARLY = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
HANGS, GRACE = 60, 90  # seconds: one test; a run beyond its time, ended from outside


class Outcome(NamedTuple):
    """How a run of tests ended.

    Attributes:
        verdict: "killed", "survived", or "unfinished" when its seconds were spent before.
        by: the first test that failed, or what else went wrong.
        seconds: what it took.
    """

    verdict: str
    by: str
    seconds: float


def warm_up() -> None:
    """Import what every test run needs."""
    os.environ.update(SETTINGS)
    for name in LIBRARIES:
        importlib.import_module(name)
    diffusers = importlib.import_module("diffusers")
    for name in SCHEDULERS:
        getattr(diffusers, name)


def copy_tree(root: Path, place: Path) -> None:
    """Copy what the tests need, without what Python compiled there."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(source, place / name, ignore=ignored)
        else:
            shutil.copy(source, place / name)


def run(place: Path, tests: Sequence[str], seconds: float, report: Path) -> Outcome:
    """Run tests in the copy, to the first failure, for about so many seconds."""
    report.unlink(missing_ok=True)
    started = time.monotonic()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_child, args=(place, tests, seconds, report))
    process.start()
    process.join(None if math.isinf(seconds) else seconds + GRACE)
    if hanging := process.is_alive():
        process.kill()
        process.join()
    took = round(time.monotonic() - started, 1)
    if hanging or not report.exists():
        return Outcome("killed", "ran on without end" if hanging else "the process died", took)
    how, by = json.loads(report.read_text("utf-8"))
    return Outcome(how, by, took)


class Watch:
    """A plugin of pytest that notes the first failure and stops when the time is spent."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.failed = ""
        self.spent = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (import)"

    def pytest_runtest_protocol(self, item: Any) -> None:
        if time.monotonic() > self.end:
            self.spent, item.session.shouldstop = True, "time is spent"


def verdict(status: int, watch: Watch) -> tuple[str, str]:
    """(verdict, by) of pytest's exit status and what was noted.

    Raises:
        ValueError: no test was collected, which says nothing.
    """
    if status == 5:
        raise ValueError("no test was collected")
    if watch.failed or (status and not watch.spent):
        return "killed", watch.failed or f"status {status} of pytest"
    return ("unfinished" if watch.spent else "survived"), ""


def _child(place: Path, tests: Sequence[str], seconds: float, report: Path) -> None:
    os.setsid()
    os.chdir(place)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    _forget(("benchmarks", "tests"))
    sys.path[:] = [str(place), *(p for p in sys.path if p not in {"", str(Path.cwd())})]
    sys.argv = ["pytest"]
    watch = Watch(seconds)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", f"timeout={HANGS}", *EARLY]
    pytest_main: Callable[..., int] = sys.modules["pytest"].main
    status = int(pytest_main([*options, *tests], plugins=[watch]))
    _check_origin(place)
    report.write_text(json.dumps(verdict(status, watch)), "utf-8")
    os._exit(0)


def _forget(packages: Sequence[str]) -> None:
    """Let these packages be imported anew, from the copy."""
    for name in [n for n in sys.modules if n.split(".")[0] in packages]:
        del sys.modules[name]


def _check_origin(place: Path) -> None:
    package = sys.modules.get("diffusers_curriculum")
    if package is not None and not str(package.__file__).startswith(str(place)):
        raise RuntimeError(f"the tests imported {package.__file__}, not the copy in {place}")
