"""Starting and ending a training process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from tqdm import tqdm

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.environment import NO_TRACKER
from diffusers_curriculum.training.errors import (
    DiskFullError,
    ExitCode,
    NonFiniteError,
    UsageError,
    tell_launcher,
)
from diffusers_curriculum.training.process.launcher import check_environment, check_in_effect
from diffusers_curriculum.training.process.memory import keep_freed_memory
from diffusers_curriculum.training.process.quiet import without_torchvision_lines
from diffusers_curriculum.training.process.sharding import put_in_effect, sharding_plugin
from diffusers_curriculum.training.process.stopping import Stopped

logger = logging.getLogger(__name__)

_OWN = "diffusers_curriculum"
_STATUS = {
    UsageError: ExitCode.USAGE,
    NonFiniteError: ExitCode.NONFINITE,
    DiskFullError: ExitCode.DISK,
}


def exit_status(run: Callable[[], object]) -> int:
    """Run to the end, and tell the outcome as an exit status with one message on stderr."""
    without_torchvision_lines()
    try:
        run()
    except Stopped as stopped:
        logger.info("%s", stopped)
        return stopped.status
    except tuple(_STATUS) as error:
        sys.stderr.write(f"error: {error}\n")
        tell_launcher(f"error: {error}")
        return next(status for kind, status in _STATUS.items() if isinstance(error, kind))
    return ExitCode.DONE


def make_accelerator(args: Arguments) -> Accelerator:
    """The accelerator of the run, with logging set up; nothing assumes a kind of device.

    Raises:
        UsageError: the environment or the machine does not go with the command line.
    """
    check_environment(args)
    logs, plugin = os.path.join(args.output_dir, args.logging_dir), sharding_plugin()
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == NO_TRACKER else args.report_to,
            fsdp_plugin=plugin,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=logs),
            # the others wait while the main process looks at a large data set, or draws
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except (ImportError, NotImplementedError, ValueError) as error:
        raise UsageError(
            f"accelerate cannot be set up: {error} Change its configuration (`accelerate config`), "
            "the ACCELERATE_ variables or --mixed_precision."
        ) from error
    put_in_effect(accelerator, plugin)
    check_in_effect(args, accelerator)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.device.type == "mps":
        accelerator.native_amp = False
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    _set_up_logging(accelerator)
    return accelerator


class _AboveBars(logging.StreamHandler):
    """Writes log lines above the progress bars, as tqdm.contrib.logging does."""

    def emit(self, record: logging.LogRecord) -> None:
        # tqdm's lock is shared with forked workers, which show no bars: one that was killed while
        # it held the lock would stop this process for good
        worker = multiprocessing.parent_process() is not None
        with ExitStack() as bars:
            # bars with a lock of their own (those of huggingface_hub) may come and go meanwhile in
            # other threads: then the line stands beside them
            with suppress(RuntimeError):
                if not worker:
                    bars.enter_context(tqdm.external_write_mode(file=self.stream))
            super().emit(record)


def _set_up_logging(accelerator: Accelerator) -> None:
    import datasets
    import transformers

    main = accelerator.is_local_main_process
    logging.basicConfig(
        handlers=[_AboveBars()],
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        level=logging.INFO if main else logging.WARNING,
    )
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    # all processes look at flags and data, and one says what is left out or without effect
    logging.getLogger(_OWN).setLevel(logging.NOTSET if main else logging.ERROR)
    for library in (datasets, transformers, diffusers):
        quiet = library.utils.logging
        (quiet.set_verbosity_warning if main else quiet.set_verbosity_error)()
        _above_bars(logging.getLogger(library.__name__))
    logging.captureWarnings(True)


def _above_bars(library: logging.Logger) -> None:
    """Let what a library logs by a handler of its own, beside the bars, come with all else."""
    for handler in [*library.handlers]:
        if type(handler) is logging.StreamHandler:
            library.removeHandler(handler)
            library.propagate = True


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of frozen models: that of mixed precision, from the flag or the launcher."""
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16}
    return kinds.get(accelerator.mixed_precision, torch.float32)


def agree_on_seed(
    seed: int | None, resumed: Mapping[str, Any] | None, allowed: Collection[str] = ()
) -> int:
    """The seed of the run on all processes: the given one, the resumed run's, or a fresh one.

    Raises:
        UsageError: the given seed is not that of the run to resume, and "seed" is not ``allowed``
            to change.
    """
    before = None if resumed is None else int(resumed["seed"])
    if before is not None and seed not in (None, before) and "seed" not in allowed:
        raise UsageError(
            f"--seed is {seed}, but the run to resume has seed {before}: data order and draws "
            f"would not go on. Leave --seed out, pass --seed {before}, or accept it with "
            "--allow_config_change seed."
        )
    known = before if seed is None else seed
    return broadcast_object_list([secrets.randbits(31) if known is None else known])[0]


def prepare_output(accelerator: Accelerator, output_dir: str, clean: Callable[[str], None]) -> None:
    """Make the output folder and clear up what a killed save left, once, before anyone reads.

    Raises:
        UsageError: nothing can be written there.
    """
    if accelerator.is_main_process:
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output_dir):
                pass
            clean(output_dir)
        except OSError as error:
            raise UsageError(
                f"--output_dir {output_dir} cannot be written: {error.strerror}. Make it writable "
                "or give another folder."
            ) from error
    accelerator.wait_for_everyone()


def log_run(facts: Mapping[str, Any]) -> None:
    """Log what is about to be trained."""
    logger.info("***** Running training *****")
    for name, value in facts.items():
        logger.info("  %s = %s", name, value)
