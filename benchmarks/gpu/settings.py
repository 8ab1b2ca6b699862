"""How a part is to be run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

MEMORY_LIMIT_GIB = 100


@dataclass(frozen=True)
class Settings:
    """Device, sizes and scratch space of one part.

    Attributes:
        smoke: minuscule sizes and single steps: does the code run at all?
        work_dir: an empty folder that is deleted afterwards.
    """

    device: torch.device
    smoke: bool
    work_dir: Path

    @property
    def cuda(self) -> bool:
        """Whether synchronisations and device memory can be looked at."""
        return self.device.type == "cuda"


def prepare_device(settings: Settings) -> None:
    """Never take more device memory than a shared machine can spare."""
    if settings.cuda:
        total = torch.cuda.get_device_properties(settings.device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_LIMIT_GIB / total))
