"""Run a training script in this process and note when its optimizer steps end.

    python -m benchmarks.against_diffusers.timed NOTES.json T0 STEPS SCRIPT.py [its arguments]

The run ends with its step STEPS. T0 is the time (of the epoch) at which the process was asked for.
With PHASES=1 in the environment the parts of a step are timed as well, for which everything is
imported first: such a run tells nothing of the start.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import runpy
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUBS = Path(__file__).parents[2] / "tests" / "drop_in" / "stubs"


class Ended(BaseException):
    """All steps are made; nothing catches it on its way out of a script."""


class Notes:
    """When steps ended, and how long the parts of each took.

    Args:
        asked: time at which the process was asked for.
        steps: the run ends with so many.

    Attributes:
        ends: seconds since T0 at the end of each optimizer step.
        parts: seconds of each phase in each step, by name.
    """

    def __init__(self, asked: float, steps: int) -> None:
        self.asked, self.steps, self.ends = asked, steps, list[float]()
        self.parts: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._inside = False

    def step_ended(self, *_: Any) -> None:
        self.ends.append(time.time() - self.asked)
        self.parts.append(dict(self._now))
        self._now.clear()
        if len(self.ends) == self.steps:
            raise Ended

    def timed(self, owner: Any, name: str, phase: str) -> None:
        """Count the time of ``owner.name`` to a phase; of calls within others, the outer one."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            self._inside, start = True, time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False
                self._now[phase] += time.perf_counter() - start

        setattr(owner, name, wrapped)

    def write(self, file: Path) -> None:
        notes = {"ends": self.ends, "parts": self.parts, "peak_bytes": peak_bytes()}
        file.write_text(json.dumps(notes), "utf-8")


def peak_bytes() -> int:
    """The most memory that this process has had; on Linux not by getrusage, which also counts what
    the process had that started it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (told,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8"))
    return int(told) * 1024


def watch_phases(notes: Notes) -> None:
    """Time data, encoding, the network, gradients, the optimizer, the sampler and logging."""
    import accelerate
    import diffusers
    import transformers
    from torch.optim import AdamW
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    from diffusers_curriculum.samplers import TimestepSampler
    from diffusers_curriculum.training.levels.levels import Levels

    for owner, name, phase in (
        (_BaseDataLoaderIter, "__next__", "data"),
        (diffusers.AutoencoderKL, "encode", "encode"),
        (transformers.CLIPTextModel, "forward", "encode"),
        (diffusers.UNet2DConditionModel, "forward", "forward"),
        (diffusers.UNet2DModel, "forward", "forward"),
        (diffusers.DiTTransformer2DModel, "forward", "forward"),
        (accelerate.Accelerator, "backward", "backward"),
        (accelerate.Accelerator, "clip_grad_norm_", "clip"),
        (AdamW, "step", "optimizer"),
        (TimestepSampler, "sample", "sampler"),
        (Levels, "observe", "sampler"),
        (accelerate.Accelerator, "log", "logging"),
    ):
        notes.timed(owner, name, phase)


def hide_the_stand_in() -> None:
    """Let libraries look for torchvision before a stand-in can be found in its place."""
    import transformers
    from datasets import config

    if not all((config.TORCHVISION_AVAILABLE, transformers.utils.is_torchvision_available())):
        sys.path.insert(0, str(STUBS))


def main(file: str, asked: str, steps: str, script: str, *argv: str) -> None:
    """Run the script as python would, until it has made its steps."""
    notes = Notes(float(asked), int(steps))
    if "torchvision" in Path(script).read_text("utf-8"):
        hide_the_stand_in()
    if os.environ.get("PHASES"):
        watch_phases(notes)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ended: Callable[..., None] = notes.step_ended
    register_optimizer_step_post_hook(ended)
    sys.argv = [script, *argv]
    try:
        runpy.run_path(script, run_name="__main__")
    except Ended:
        notes.write(Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
