"""What goes to the trackers, whichever they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError

_NOT_IN_MLFLOW = re.compile(r"[^\w.\- :/]")


def start_trackers(accelerator: Any, args: Arguments) -> None:
    """Start them and give them the arguments; on the main process, before any model is loaded.

    Raises:
        UsageError: a tracker cannot be started, such as one that asks for a login.
    """
    if not accelerator.is_main_process:
        return
    try:
        accelerator.init_trackers(args.tracker_project_name, args.tracked())
    except Exception as error:
        flag = args.flag("report_to")
        raise UsageError(
            f"--{flag} is {args.report_to}, which cannot be started: {type(error).__name__}: "
            f"{error}. Set it up (most want a login), choose another, or --{flag} none."
        ) from error


def log_metrics(accelerator: Any, metrics: Mapping[str, Any], step: int) -> None:
    """Send numbers by name; where MLflow is among the trackers, by names that its rules allow."""
    if accelerator.is_main_process and any(t.name == "mlflow" for t in accelerator.trackers):
        metrics = {mlflow_name(name): value for name, value in metrics.items()}
    accelerator.log(dict(metrics), step=step)


def mlflow_name(name: str) -> str:
    """A name of letters, digits, blanks and ``_-.:/``: ``loss/-2 to 0`` for ``loss/[-2,0)``."""
    return _NOT_IN_MLFLOW.sub("", name.replace(",", " to "))
