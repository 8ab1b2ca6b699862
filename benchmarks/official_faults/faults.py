"""What is done to a run: each function here is installed in the process of the run."""

from __future__ import annotations

import importlib.machinery
import itertools
import os
import pickle  # noqa: TID251 - the poison must be one
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate
import diffusers
import huggingface_hub
import torch
from huggingface_hub.utils import filter_repo_objects
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.official_faults.trial import wrap

Fault = Callable[[], None]


def kill_at_save(number: int) -> Fault:
    """SIGKILL when this call of ``save_state`` begins, after whatever is done before it."""
    calls = itertools.count(1)
    return lambda: wrap(accelerate.Accelerator, "save_state", lambda *a, **k: _kill(calls, number))


def kill_inside_save(number: int) -> Fault:
    """SIGKILL in this ``save_state`` when it begins to write the optimizer."""
    calls = itertools.count(1)

    def before(_: Any, file: Any, *__: Any, **___: Any) -> None:
        if Path(file).name == "optimizer.bin":
            _kill(calls, number)

    return lambda: wrap(torch, "save", before)


def sigterm_after(step: int) -> Fault:
    """SIGTERM after this optimizer step."""
    steps = itertools.count(1)

    def hook(*_: Any) -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    def install() -> None:
        register_optimizer_step_post_hook(hook)

    return install


def nan_from(step: int) -> Fault:
    """The loss is NaN from this step on."""
    loss, calls = torch.nn.functional.mse_loss, itertools.count(1)

    def spoilt(*args: Any, **kwargs: Any) -> torch.Tensor:
        return loss(*args, **kwargs) * (torch.nan if next(calls) >= step else 1.0)

    def install() -> None:
        torch.nn.functional.mse_loss = spoilt

    return install


def file_size_limit(size: int) -> Fault:
    """No file may grow beyond so many bytes: the system itself refuses, as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def hub(told: Path) -> Fault:
    """A Hub that writes the names of the files that it would get to ``told``."""

    def create_repo(repo_id: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=f"somebody/{repo_id}")

    def upload_folder(folder_path: str, ignore_patterns: Any = None, **_: Any) -> None:
        root = Path(folder_path)
        names = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        sent = filter_repo_objects(names, ignore_patterns=ignore_patterns)
        told.write_text("\n".join(sent))

    def install() -> None:
        huggingface_hub.create_repo, huggingface_hub.upload_folder = create_repo, upload_folder

    return install


def wandb_installed() -> None:
    """An installed wandb without a run."""
    module = ModuleType("wandb")
    vars(module).update(run=None, __spec__=importlib.machinery.ModuleSpec("wandb", None))
    sys.modules["wandb"] = module
    diffusers.utils.is_wandb_available = lambda: True


class Poison:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def poison(file: Path, canary: Path) -> None:
    """Replace a file by one that makes ``canary`` when it is unpickled."""
    if file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(Poison(canary)))
    else:
        torch.save(Poison(canary), file)


def flip_bit(file: Path, at: float = 0.75) -> None:
    """Flip one bit, at this share of the file."""
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 0x10
    file.write_bytes(content)


def _kill(calls: Any, number: int) -> None:
    if next(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
