"""What the numbers were measured on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.settings import Settings

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "xformers", "triton")


def measure(findings: Findings, settings: Settings) -> None:
    """Versions of everything, and the device."""
    findings.attempt_all({"versions": _versions, "device": lambda: _device(settings.device)})


def _versions() -> dict[str, Any]:
    found = {name: _version(name) for name in PACKAGES}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        **found,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": platform.machine(), "threads": torch.get_num_threads()}
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "capability": f"{facts.major}.{facts.minor}",
        "driver": _driver(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.split("\n")[0].strip()
