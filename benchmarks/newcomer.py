"""How long a newcomer's way takes, by the clock: from nothing installed to a pipeline on the Hub.

    python -m benchmarks.newcomer [--latest] [--json PATH] [--check]

Runs the first commands of docs/tutorial.md, and the line of diffusers below them, in a new
environment outside the checkout, with a wheel built of it and the versions of constraints.txt;
--latest takes the newest ones that are allowed. The Hub is the one of the tests, on the loopback
interface. That pictures were drawn and the pipeline has arrived is looked at. With --check the exit
status is 1 where it all takes more than 8 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.training.fake_hub import FakeHub, serve

ROOT = Path(__file__).parents[1]
MINUTES = 8.0  # at most
# of this process, or of the machine's settings for tests
_NOT_A_NEWCOMERS = ("PYTHONPATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")
_NOT_A_NEWCOMERS += ("HF_DATASETS_OFFLINE", "WANDB_MODE", "VIRTUAL_ENV")


def commands(wheel: Path) -> Iterator[list[str]]:
    """The words of each command of the tutorial's beginning."""
    tutorial = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    shell, python = re.findall(r"^```(?:bash|python)\n(.*?)^```", tutorial, re.S | re.M)[:2]
    for line in shell.splitlines():
        words = shlex.split(line)
        yield [word.replace("diffusers-curriculum[", f"{wheel}[") for word in words]
    yield ["python", "-c", f"from diffusers import DiffusionPipeline\n{python}"]


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def is_drawn(picture: Path) -> bool:
    """Whether a file is an image that shows more than one colour."""
    with Image.open(picture) as image:
        return float(np.asarray(image.convert("L"), dtype=float).std()) > 1


def faults(folder: Path, hub: FakeHub) -> list[str]:
    """What a newcomer would miss at the end."""
    pictures = ("demo/pictures/digits_after.png", "demo/pictures/learning_curve.png", "three.png")
    blank = [f"{name} is blank" for name in pictures if not is_drawn(folder / name)]
    wanted = {"model_index.json", "README.md", "unet/diffusion_pytorch_model.safetensors"}
    return [*blank, *(f"{name} is not on the Hub" for name in wanted - hub.files.keys())]


def timed(words: Sequence[str], folder: Path, binaries: Path, hub: FakeHub, pins: str) -> float:
    """Seconds of a command.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_A_NEWCOMERS}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_a_newcomer", "HF_HOME": str(folder)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "PIP_CONSTRAINT": pins}
    environment["PATH"] = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    start = time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}: {(done.stdout + done.stderr)[-2000:]}")
    return round(time.monotonic() - start, 1)


def run(folder: Path, hub: FakeHub, pins: str) -> dict[str, float]:
    """Seconds of each command, under its first two words."""
    venv.create(folder / "venv", with_pip=True)
    binaries, wheel = folder / "venv" / "bin", build_wheel(folder)
    told = [(words, timed(words, folder, binaries, hub, pins)) for words in commands(wheel)]
    return {" ".join(words[:2]): seconds for words, seconds in told}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--latest", action="store_true", help="the newest versions, not the pinned")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--check", action="store_true", help="fail where it takes too long")
    args = parser.parse_args(argv)
    pins = os.devnull if args.latest else str(ROOT / "constraints.txt")
    with tempfile.TemporaryDirectory() as folder, serve() as hub:
        seconds = run(Path(folder), hub, pins)
        missing = faults(Path(folder), hub)
    found = {"seconds": seconds, "minutes": round(sum(seconds.values()) / 60, 1), "faults": missing}
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return int(bool(missing) or (args.check and found["minutes"] > MINUTES))


if __name__ == "__main__":
    raise SystemExit(main())
