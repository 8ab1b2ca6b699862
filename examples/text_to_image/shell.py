"""Commands as a user would type them: shown, run, and stopped where they fail."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

UNIFORM = "-uniform"  # at the end of the folder of a twin


def short(path: Path) -> str:
    """Return a path as it would be typed here, and in full where the folder is another one."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def run_all(commands: Iterable[list[str]]) -> None:
    """Run commands one after the other; beside a training that chooses its timesteps its uniform
    twin runs at the same time."""
    for command in commands:
        twin = uniform_twin(command)
        run(command, *([twin] if twin else []))


def changed(command: list[str], **flags: list[str] | None) -> list[str]:
    """Return a command with other words after some flags, those at its end that it lacks, and
    without those for which there is None."""
    given = {f"--{name}": words for name, words in flags.items()}
    kept = [group for group in _groups(command) if group[0] not in given]
    more = [[flag, *words] for flag, words in given.items() if words is not None]
    return [word for group in [*kept, *more] for word in group]


def _groups(command: list[str]) -> list[list[str]]:
    """Each flag with its words, after the words before the first."""
    starts = [i for i, word in enumerate(command) if word.startswith("--")]
    return [command[i:j] for i, j in zip([0, *starts], [*starts, len(command)], strict=True)]


def uniform_twin(command: list[str]) -> list[str] | None:
    """Return a training command with uniform timesteps and all else the same, its results in a
    folder of its own; None for a command that does not choose timesteps."""
    groups = _groups(command)
    kept = [g for g in groups if not (g and g[0].startswith(("--timestep_", "--curriculum")))]
    if kept == groups:
        return None
    moved = [[g[0], f"{g[1]}{UNIFORM}"] if g[:1] == ["--output_dir"] else g for g in kept]
    return [word for group in moved for word in group]


def run(command: list[str], *beside: list[str]) -> None:
    """Show commands, run them with this Python environment's tools, stop the demo where one fails.

    Those ``beside`` the first run at the same time, and what they write is shown if they fail.
    """
    for each in (command, *beside):
        print(f"\n$ {shlex.join(each)}{'' if each is command else ' &'}", flush=True)
    start = time.monotonic()
    with ExitStack() as stack:
        logs = [stack.enter_context(TemporaryFile("w+", encoding="utf-8")) for _ in beside]
        others = [_start(each, log) for each, log in zip(beside, logs, strict=True)]
        for other in others:
            stack.callback(_end, other)
        status = _start(command).wait()
        for other, log in zip(others, logs, strict=True):
            if status == 0 and other.wait():
                log.seek(0)
                print(log.read()[-2000:], flush=True)
                status = other.returncode
    if status:
        raise SystemExit(f"a command above ended with status {status}; the demo stops here")
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, with those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _start(command: list[str], log: IO[str] | None = None) -> subprocess.Popen[bytes]:
    """A process; one with a ``log`` begins a group of its own."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = sys.executable if command[0] == "python" else shutil.which(command[0], path=tools)
    if program is None:
        raise SystemExit(f"{command[0]!r} is missing: pip install 'diffusers-curriculum[train]'")
    surroundings = {**os.environ, "PATH": tools}
    options = {"stdout": log, "stderr": log, "start_new_session": log is not None}
    return subprocess.Popen([program, *command[1:]], env=surroundings, **options)
