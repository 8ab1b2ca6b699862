"""One run of the official script in a process of its own: its journal and its faults.

The script itself is not changed. What it calls is wrapped, and every call that tells something is
noted at once, so that the notes survive a kill.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import runpy
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

LOADED = (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel)


@dataclass(frozen=True)
class Job:
    """What one process runs.

    Attributes:
        faults: called before the script starts.
        journal: where what it did goes, one JSON object per line.
        output: where its standard output and error go.
    """

    script: Path
    argv: Sequence[str]
    journal: Path
    output: Path
    faults: Sequence[Callable[[], None]] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def run(job: Job) -> None:
    """Run the script as python would, and exit with the status that it would have."""
    os.environ.update(job.environment)
    os.chdir(job.output.parent)
    target = os.open(job.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(target, stream)
    for fault in job.faults:
        fault()
    journal = Journal(job.journal)  # outermost: a call is noted before its fault
    journal.watch()
    sys.argv = [str(job.script), *job.argv]
    try:
        runpy.run_path(str(job.script), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        journal.note("end")


class Journal:
    """Notes what the script does."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")
        self.start = time.monotonic()

    def note(self, what: str, **values: Any) -> None:
        """Write an event to the file at once."""
        seconds = round(time.monotonic() - self.start, 3)
        self.file.write(json.dumps({"what": what, "at": seconds, **values}) + "\n")
        self.file.flush()

    def watch(self) -> None:
        """Wrap everything that is noted."""
        self._watch_numbers()
        self._watch_files()
        for model in LOADED:
            wrap(model, "from_pretrained", lambda *a, _n=model.__name__, **k: self.note(_n))

    def _watch_numbers(self) -> None:
        def draw(_: Any, latents: Any, noise: Any, timesteps: Any) -> None:
            self.note("draw", timesteps=timesteps.tolist(), noise=sha256(noise))

        def log(_: Any, values: Mapping[str, float], step: int, **__: Any) -> None:
            self.note("loss", step=step, value=float(values["train_loss"]).hex())

        def captions(module: Any, inputs: Any) -> None:
            if isinstance(module, transformers.CLIPTextModel):
                self.note("captions", ids=[sha256(row)[:12] for row in inputs[0]])

        def step(optimizer: Any, *_: Any) -> None:
            self.note("step", lr=optimizer.param_groups[0]["lr"])

        wrap(diffusers.DDPMScheduler, "add_noise", draw)
        wrap(accelerate.Accelerator, "log", log)
        register_module_forward_pre_hook(captions)
        register_optimizer_step_pre_hook(step)

    def _watch_files(self) -> None:
        def load(file: Any, *_: Any, **options: Any) -> None:
            self.note("torch.load", file=Path(file).name, weights_only=options.get("weights_only"))

        wrap(shutil, "rmtree", lambda path, *a, **k: self.note("delete", name=Path(path).name))
        wrap(torch, "load", load)
        for name in ("save_state", "load_state"):
            noted = functools.partial(self._folder, name)
            wrap(accelerate.Accelerator, name, noted)

    def _folder(self, what: str, _: Any, folder: Any, *__: Any) -> None:
        self.note(what, name=Path(folder).name, inside=Path(folder).parent.name)


def wrap(owner: Any, name: str, before: Callable[..., None]) -> None:
    """Call ``before`` with the arguments of each call of ``owner.name``, which stays as it is."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def sha256(tensor: torch.Tensor) -> str:
    """Of the bytes of a tensor."""
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
