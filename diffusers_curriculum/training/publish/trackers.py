"""What goes to the trackers: the one place that knows them apart.

accelerate starts them and sends them numbers. Pictures with captions, lines of text and names are
each tracker's own affair, and stand here. Whatever fails in a tracker once it is started is a
warning: no run ends for it.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from PIL.Image import Image

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

_NOT_IN_MLFLOW = re.compile(r"[^\w.\- /]")


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
    accelerator.trackers = [tracker_of(started) for started in accelerator.trackers]


def log_images(
    accelerator: Any, tag: str, images: Sequence[Image], prompts: Sequence[str], step: int
) -> None:
    """Send pictures, prompt by prompt, from the main process to the trackers. ``tag`` is
    "validation" during training, "test" at its end, or the name of a plot."""
    if images and accelerator.is_main_process:
        for tracker in accelerator.trackers:
            tracker.log_images(tag, images, captions(images, prompts), step)


def log_lines(accelerator: Any, tag: str, lines: Sequence[str], step: int) -> None:
    """Send lines of text, all that there are so far, from the main process to the trackers."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            tracker.log_lines(tag, lines, step)


def captions(images: Sequence[Image], prompts: Sequence[str]) -> list[str]:
    """The prompt of each picture, numbered through; one picture has its prompt as it is."""
    if len(images) == 1:
        return list(prompts[:1])
    each = max(1, len(images) // max(1, len(prompts)))
    return [f"{i}: {prompts[i // each]}" for i in range(len(images))]


def mlflow_name(name: str) -> str:
    """A name of letters, digits, blanks and ``_-./``: ``loss/-2 to 0`` for ``loss/[-2,0)``."""
    return _NOT_IN_MLFLOW.sub("", name.replace(",", " to "))


class RunTracker:
    """A tracker that accelerate has started, in the place of it. Here: one that takes numbers.

    Args:
        tracker: accelerate's.
    """

    def __init__(self, tracker: Any) -> None:
        self.tracker, self.name = tracker, tracker.name
        self.lost, self._silent = 0, False

    def log(self, values: Mapping[str, Any], step: int | None = None, **options: Any) -> None:
        """Numbers by name; accelerate calls this."""
        self._attempt(self._send_numbers, values, step, **options)

    def log_images(
        self, tag: str, images: Sequence[Image], texts: Sequence[str], step: int
    ) -> None:
        """Pictures, each with its caption."""
        self._attempt(self._send_images, tag, images, texts, step)

    def log_lines(self, tag: str, lines: Sequence[str], step: int) -> None:
        """Lines of text that take the place of those sent before."""
        self._attempt(self._send_lines, tag, lines, step)

    def finish(self) -> None:
        """End it; accelerate calls this."""
        self._attempt(self.tracker.finish)
        if self.lost > 1:
            logger.warning("Tracker %s lacks what was sent %d times.", self.name, self.lost)

    def _attempt(self, send: Callable[..., Any], *sent: Any, **options: Any) -> None:
        try:
            send(*sent, **options)
        except Exception as error:
            self.lost += 1
            if self.lost == 1:
                kind = type(error).__name__
                text = (
                    "Tracker %s failed (%s: %s). The run goes on, and further failures are counted."
                )
                logger.warning(text, self.name, kind, error)

    def _send_numbers(self, values: Mapping[str, Any], step: int | None, **options: Any) -> None:
        self.tracker.log(dict(values), step=step, **options)

    def _send_images(self, tag: str, images: Any, texts: Sequence[str], step: int) -> None:
        self._warn_once()

    def _send_lines(self, tag: str, lines: Sequence[str], step: int) -> None:
        self._warn_once()

    def _warn_once(self) -> None:
        if not self._silent:
            known = ", ".join(_KINDS)
            logger.warning("Tracker %s is sent numbers only; pictures go to %s.", self.name, known)
        self._silent = True


class _TensorBoard(RunTracker):
    """Pictures without captions, text as Markdown."""

    def _send_images(self, tag: str, images: Any, texts: Sequence[str], step: int) -> None:
        stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
        self.tracker.log_images({tag: stacked}, step=step, dataformats="NHWC")

    def _send_lines(self, tag: str, lines: Sequence[str], step: int) -> None:
        self.tracker.log({tag: _listed(lines)}, step=step)


class _WandB(RunTracker):
    """Objects of the library's own, among the numbers."""

    def _send_images(self, tag: str, images: Any, texts: Sequence[str], step: int) -> None:
        self.tracker.log({tag: self._pictures(images, texts)}, step=step)

    def _send_lines(self, tag: str, lines: Sequence[str], step: int) -> None:
        self.tracker.log({tag: self._text(lines)}, step=step)

    def _pictures(self, images: Any, texts: Sequence[str]) -> list[Any]:
        # the trackers' own log_images leaves no room for captions
        kind = import_module(self.name).Image
        return [kind(image, caption=text) for image, text in zip(images, texts, strict=True)]

    def _text(self, lines: Sequence[str]) -> Any:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        return import_module(self.name).Html(f"<ul>{items}</ul>")


class _SwanLab(_WandB):
    """The same, with a class for text."""

    def _text(self, lines: Sequence[str]) -> Any:
        return import_module(self.name).Text("\n".join(lines))


class _Trackio(_WandB):
    """The same, each picture by a name of its own, as it takes no lists of them."""

    def _send_images(self, tag: str, images: Any, texts: Sequence[str], step: int) -> None:
        pictures = self._pictures(images, texts)
        named = dict(zip(_numbered(tag, len(pictures)), pictures, strict=True))
        self.tracker.log(named, step=step)

    def _text(self, lines: Sequence[str]) -> Any:
        return import_module(self.name).Markdown(_listed(lines))


class _Comet(RunTracker):
    """Through the experiment itself, as accelerate's tracker takes numbers and words only."""

    def _send_images(self, tag: str, images: Any, texts: Sequence[str], step: int) -> None:
        names = _numbered(tag, len(images))
        for name, image, text in zip(names, images, texts, strict=True):
            self.tracker.tracker.log_image(image, name, step=step, metadata={"caption": text})

    def _send_lines(self, tag: str, lines: Sequence[str], step: int) -> None:
        self.tracker.tracker.log_text(_listed(lines), step=step, metadata={"tag": tag})


class _MLflow(RunTracker):
    """Names by its rules; pictures by step, and text as a file among the artifacts."""

    def _send_numbers(self, values: Mapping[str, Any], step: int | None, **options: Any) -> None:
        named = {mlflow_name(name): value for name, value in values.items()}
        self.tracker.log(named, step=step, **options)

    def _send_images(self, tag: str, images: Any, texts: Sequence[str], step: int) -> None:
        mlflow: Any = import_module("mlflow")
        for name, image in zip(_numbered(mlflow_name(tag), len(images)), images, strict=True):
            mlflow.log_image(image, key=name, step=step, synchronous=True)
        if len(images) > 1:
            mlflow.log_text(_listed(texts), f"{mlflow_name(tag)}.md")

    def _send_lines(self, tag: str, lines: Sequence[str], step: int) -> None:
        mlflow: Any = import_module("mlflow")
        mlflow.log_text(_listed(lines), f"{mlflow_name(tag)}.md")


_KINDS: dict[str, type[RunTracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
    "comet_ml": _Comet,
    "mlflow": _MLflow,
    "swanlab": _SwanLab,
}


def tracker_of(tracker: Any) -> RunTracker:
    """What stands for a tracker that accelerate has started."""
    return _KINDS.get(tracker.name, RunTracker)(tracker)


def _numbered(tag: str, count: int) -> list[str]:
    """Names of several pictures; one has the tag for its own."""
    return [tag] if count == 1 else [f"{tag}/{number}" for number in range(count)]


def _listed(lines: Sequence[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"* {line}" for line in lines)
