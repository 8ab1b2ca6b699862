"""How a cache is filled, by one process or several, and gets its name when it is whole.

.tmp-<folder>/plan.json, files/    what a killed run leaves and a later one goes on with
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_curriculum.training.cache.files import Kind, remember_verified
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.storage.files import write_atomically
from diffusers_curriculum.training.storage.folders import publish, sync_tree
from diffusers_curriculum.training.storage.manifest import MANIFEST, write_manifest


@dataclass(frozen=True)
class Processes:
    """Those that fill a cache together, as one of them sees it.

    Attributes:
        rank: its number.
        world_size: how many there are.
        wait: returns when all have called it.
        progress: whether it shows a bar.
    """

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], object] = lambda: None
    progress: bool = True

    @classmethod
    def of(cls, accelerator: Any) -> Processes:
        """Those of a run."""
        return cls(
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.wait_for_everyone,
            accelerator.is_local_main_process,
        )


class WorkFolder(ABC):
    """Where a cache is filled, batch by batch, by one process or several.

    Args:
        final: folder of the cache to be.
        kind: of what.
        fingerprint: what it is made from.
        batches: how many there are.
        plan: what else tells how it is made, as plain data; what is there of another making is
            thrown away.
    """

    def __init__(
        self, final: Path, kind: Kind, fingerprint: Mapping[str, Any], batches: int, *plan: Any
    ) -> None:
        self.final, self.kind, self.fingerprint = final, kind, dict(fingerprint)
        self.folder = final.with_name(f".tmp-{final.name}")
        self.files, self.batches = self.folder / "files", batches
        self.plan = json.dumps([self.fingerprint, *plan], sort_keys=True)

    @abstractmethod
    def done(self) -> bytes:
        """A byte for each batch: 1 where it is on disk."""

    def require_space(self) -> None:  # noqa: B027
        """Refuse a disk that is too small, as far as that can be told."""

    def make_files(self) -> None:  # noqa: B027
        """Make the files that batches are written into; here each makes its own."""

    def is_fit(self) -> bool:
        """Whether the folder is of this plan and its files have their sizes."""
        plan = self.folder / "plan.json"
        return plan.is_file() and plan.read_text("utf-8") == self.plan

    def fill(self, encode: Callable[[Sequence[int]], None], processes: Processes) -> None:
        """Fill the cache among processes, each of which calls this; whole batches are shared out,
        so that their number changes no bit.

        Args:
            encode: encodes and writes some batches.
        """
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.require_space()
        processes.wait()  # nobody looks any more at what rank 0 now changes
        if processes.rank == 0:
            self._prepare()
        processes.wait()
        done = self.done()
        own = range(processes.rank, self.batches, processes.world_size)
        encode([batch for batch in own if not done[batch]])
        processes.wait()
        if processes.rank == 0:
            self._publish()
        processes.wait()

    def _prepare(self) -> None:
        """Make the folder, unless it is there already."""
        if self.is_fit():
            for half_written in self.files.glob(".tmp-*"):
                half_written.unlink()
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.files.mkdir(parents=True)
        self.make_files()
        write_atomically(self.folder / "plan.json", self.plan)

    def _publish(self) -> None:
        """Hash the files and give the cache its name."""
        missing = self.done().count(0)
        if missing:
            raise UsageError(
                f"{missing} of {self.batches} batches are not in {self.folder}: all processes must "
                "see the same folder; put it on a disk that they share."
            )
        write_manifest(self.files, 0, {self.kind.fact: self.fingerprint})
        sync_tree(self.files)
        names = [path.name for path in self.files.iterdir() if path.name != MANIFEST]
        publish(self.files, self.final)
        remember_verified(self.final, names)
        shutil.rmtree(self.folder, ignore_errors=True)
