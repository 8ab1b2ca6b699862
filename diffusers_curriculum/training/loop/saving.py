"""When a run saves, and how all processes do it together."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint
from diffusers_curriculum.training.checkpoint.state import TrainingState
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.guard import FiniteGuard
from diffusers_curriculum.training.process.stopping import StopRequest
from diffusers_curriculum.training.storage.folders import checkpoints, rotate

logger = logging.getLogger(__name__)

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Saver:
    """Saves checkpoints: every process calls it, the main one writes, and the others wait.

    Args:
        guard: asked before every save; what is not finite is never saved.
        facts: plain data for the manifests.
        stop: told how long a save takes.
    """

    def __init__(
        self,
        args: Arguments,
        accelerator: Any,
        state: TrainingState,
        guard: FiniteGuard,
        facts: Mapping[str, Any],
        stop: StopRequest,
    ) -> None:
        self.args, self.accelerator, self.state = args, accelerator, state
        self.guard, self.facts, self.stop = guard, facts, stop

    def after_step(self, step: int, stopping: bool) -> bool:
        """Save if it is time, or if the run stops, and tell whether it was; ``step`` counts the
        finished steps.

        Raises:
            NonFiniteError: a loss or gradient was not finite.
            DiskFullError: no space; older checkpoints are intact.
            UsageError: the output folder has become read-only; older checkpoints are intact.
        """
        if not stopping and step % self.args.checkpointing_steps:
            return False
        self.guard.check(step)
        with self.stop.saving():
            with self.state.whole(self.accelerator.is_main_process):
                if self.accelerator.is_main_process:
                    self._save(step)
            self.accelerator.wait_for_everyone()
        return True

    def finish(self) -> None:
        """Delete the older checkpoints that a process killed after its last save had left."""
        found = checkpoints(Path(self.args.output_dir))
        if self.accelerator.is_main_process and found:
            rotate(found[-1], self.args.checkpoints_total_limit)

    def _save(self, step: int) -> None:
        try:
            saved = save_checkpoint(
                self.args.output_dir,
                step,
                partial(self.state.write, step=step),
                self.facts,
                total_limit=self.args.checkpoints_total_limit,
                bytes_needed=self.state.nbytes(),
            )
            logger.info("saved %s", saved)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            raise UsageError(
                f"checkpoint-{step} could not be written to {self.args.output_dir}: "
                f"{error.strerror}. Older checkpoints are intact: make the folder writable and add "
                "--resume_from_checkpoint latest."
            ) from error
