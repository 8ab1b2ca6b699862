"""Under a launcher that ends with a traceback of its own, a script's message is the last line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MESSAGE = "error: --steps is -1: it must be at least 1. Größe?"
# What `accelerate launch` of one process does, without what it imports.
LAUNCHER = """
import subprocess, sys
rest = [word for word in sys.argv[2:] if word not in ("-q", "--quiet")]
done = subprocess.run(rest)
raise SystemExit(1) if len(rest) + 2 < len(sys.argv) else ValueError("the launcher's own")
"""
SCRIPT = f"""
import sys
from diffusers_curriculum.training.errors import tell_launcher
sys.stderr.write({MESSAGE!r} + chr(10))
tell_launcher({MESSAGE!r})
raise SystemExit(2)
"""


def told(command: Sequence[str], **settings: object) -> list[str]:
    """Lines of stderr, when every process has let go of it."""
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, timeout=120, **settings)  # type: ignore[call-overload]
    assert done.returncode == 1
    assert time.monotonic() - start < 60
    return done.stderr.decode("utf-8").splitlines()


def launched(folder: Path, name: str, *more: str, **settings: object) -> list[str]:
    launcher, script = folder / name, folder / "script.py"
    launcher.write_text(LAUNCHER)
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    words = [sys.executable, str(launcher), "launch", *more, sys.executable, str(script)]
    return told(words, env=environment | settings)


@pytest.mark.parametrize("name", ["accelerate", "accelerate-launch"])
def test_the_message_is_repeated_after_the_traceback(tmp_path: Path, name: str) -> None:
    lines = launched(tmp_path, name)
    assert lines[0] == lines[-1] == MESSAGE
    assert lines[-2] == "ValueError: the launcher's own"


@pytest.mark.parametrize("quiet", ["-q", "--quiet"])
def test_nothing_is_repeated_under_a_quiet_launcher(tmp_path: Path, quiet: str) -> None:
    assert launched(tmp_path, "accelerate", quiet) == [MESSAGE]


def test_nothing_is_repeated_under_another_parent(tmp_path: Path) -> None:
    assert launched(tmp_path, "accelerated").count(MESSAGE) == 1


def test_nothing_is_repeated_under_the_launcher_of_several_processes(tmp_path: Path) -> None:
    report = str(tmp_path / "report.json")
    assert launched(tmp_path, "accelerate", TORCHELASTIC_ERROR_FILE=report).count(MESSAGE) == 1
    assert Path(report).exists()


def test_a_closed_stderr_changes_nothing(tmp_path: Path) -> None:
    closing = f"import os; os.close(2)\n{SCRIPT.replace('sys.stderr.write', 'str')}"
    (tmp_path / "accelerate").write_text(LAUNCHER)
    (tmp_path / "script.py").write_text(closing)
    words = [str(tmp_path / "accelerate"), "launch", sys.executable, str(tmp_path / "script.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = told([sys.executable, *words], env=environment)
    assert lines[-1] == "ValueError: the launcher's own"


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("flag", "value", "last"),
    [
        ("--max_train_steps", "0", "error: --max_train_steps is 0: it must be at least 1."),
        ("--max_train_steps", "x", "error: argument --max_train_steps: invalid int value: 'x'"),
    ],
)
def test_the_last_line_under_accelerate_launch(flag: str, value: str, last: str) -> None:
    """A message of this package and one of argparse."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = [str(ROOT / "examples/recipes/own_job.py"), "--output_dir", "x", flag, value]
    lines = told([sys.executable, *launch, *script], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert any("CalledProcessError" in line for line in lines)
    assert lines[-1] == last
