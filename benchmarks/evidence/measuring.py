"""One cell from its start to its result."""

from __future__ import annotations

import json
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffusers_curriculum
from benchmarks.evidence.cells import Cell, config
from benchmarks.evidence.kinds import task_of
from benchmarks.evidence.network import SeededNetwork, predicted
from benchmarks.evidence.target import Target
from benchmarks.evidence.training import Trainer

PROBES, LOWEST, HIGHEST, LEVELS = 256, -8.0, 8.0, 17  # losses by noise level
QUANTILES = (0.1, 0.5, 0.9)


def prepare(cell: Cell, cache_dir: Path, device: str = "cpu") -> Trainer:
    """Everything that stands before the first step; what several cells share is kept."""
    task = task_of(config("tasks", cell.task), cell.settings, cache_dir)
    told = config("targets", cell.target)
    target, first = Target(told), cell.settings["first_seed"]
    seeds = range(first, first + cell.settings["seeds"])
    network = task.start(seeds, target, told).to(device)
    method = config("methods", cell.method)
    return Trainer(network, seeds, task, target, method, cell.settings)


def measure(cell: Cell, cache_dir: Path, device: str = "cpu") -> dict[str, Any]:
    """Train the cell on a device and measure it at its checkpoints."""
    trainer, first = prepare(cell, cache_dir, device), cell.settings["first_seed"]
    seeds, task = range(first, first + cell.settings["seeds"]), trainer.task
    wanted, rows = cell.checkpoints(), [{"step": 0} | levels_now(trainer)]
    for step in range(cell.settings["steps"]):
        trainer.step(step)
        if step + 1 in wanted:
            with trainer.averaged() as network:
                last = step + 1 == wanted[-1]
                told = task.measure(network, seeds, trainer.target, last)
            rows.append({"step": step + 1} | told | spent(trainer) | levels_now(trainer))
    return {
        "cell": {
            name: getattr(cell, name) for name in ("task", "target", "method", "name", "group")
        },
        "held_out": cell.held_out,
        "quality": task.quality,
        "config": cell.config(),
        "made_with": made_with(device),
        "log_snr": trainer.target.levels.log_snr[grid(trainer)].tolist(),
        "checkpoints": rows,
    }


def spent(trainer: Trainer) -> dict[str, float]:
    """Seconds of training so far, of all seeds, and those of the law among them."""
    return {
        "seconds": round(trainer.total.seconds, 3),
        "law_seconds": round(trainer.overhead.seconds, 3),
    }


def grid(trainer: Trainer) -> Tensor:
    return trainer.target.grid(LOWEST, HIGHEST, LEVELS)


@torch.no_grad()
def levels_now(trainer: Trainer) -> dict[str, Any]:
    """By noise level, the mean loss of the averaged network on fixed samples with fixed noise,
    (S, L) under "loss"; and where the first seed's law lies, as quantiles of log-SNR."""
    with trainer.averaged() as network:
        losses = [_loss_at(trainer, network, index) for index in grid(trainer)]
    return {"loss": torch.stack(losses, 1).tolist(), "law": law_now(trainer)}


def _loss_at(trainer: Trainer, network: SeededNetwork, index: Tensor) -> Tensor:
    objective, levels = trainer.target.objective, trainer.target.levels
    clean, labels = trainer.task.probe(PROBES)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    at, seeds = index.expand(PROBES), network.seeds
    noisy, wanted = objective.add_noise(clean, noise, at), objective.target(clean, noise, at)
    given = objective.scale_input(noisy, at).expand(seeds, -1, -1)
    told = None if labels is None else labels.expand(seeds, -1)
    predictions = predicted(network, given, levels.log_snr[index].expand(seeds, 1), told)
    return torch.stack([objective.loss(each, wanted)[0] for each in predictions])


def law_now(trainer: Trainer) -> list[float]:
    """Quantiles of the log-SNR that the first seed draws at the next step."""
    sampler, levels = trainer.samplers[0], trainer.target.levels
    masses = sampler.probabilities(trainer.done)
    below = masses.flip(0).cumsum(0)
    at = torch.searchsorted(below, torch.tensor(QUANTILES, dtype=below.dtype)).clamp_max(
        len(levels) - 1
    )
    return [round(x, 4) for x in levels.positions.flip(0)[at].tolist()]


@cache
def made_with(device: str = "cpu") -> dict[str, str]:
    """Versions, and the kind of machine."""
    packages = ("torch", "diffusers", "numpy", "scikit-learn", "torchmetrics")
    return {
        "diffusers_curriculum": diffusers_curriculum.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "machine": machine(device),
    }


def machine(device: str) -> str:
    """What it was measured on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, networks of diffusers in bfloat16"
    return f"{processor()}, {os.cpu_count()} cores, one thread for each process"


def processor() -> str:
    """What the system calls its processor."""
    with_names = Path("/proc/cpuinfo")
    lines = with_names.read_text("utf-8").splitlines() if with_names.is_file() else []
    told = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return told[0] if told else platform.machine()


def write(file: Path, result: dict[str, Any]) -> None:
    """The result as a file that is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(rounded(result), separators=(",", ":")) + "\n", "utf-8")
    aside.replace(file)


def rounded(value: Any) -> Any:
    """Numbers to six digits; what is not finite as null, which JSON has."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value
