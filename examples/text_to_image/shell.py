"""Commands as a user would type them: shown, run, and stopped where they fail."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path


def short(path: Path) -> str:
    """Return a path as it would be typed here, and in full where the folder is another one."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def run(command: list[str]) -> None:
    """Show a command, run it with this Python environment's tools, stop the demo where it fails."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = sys.executable if command[0] == "python" else shutil.which(command[0], path=tools)
    if program is None:
        raise SystemExit(f"{command[0]!r} is not installed: run `make install` first")
    print(f"\n$ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    surroundings = {**os.environ, "PATH": tools}
    status = subprocess.run([program, *command[1:]], env=surroundings).returncode
    if status:
        raise SystemExit(f"the command above ended with status {status}; the demo stops here")
    print(f"({time.monotonic() - start:.0f} s)", flush=True)
