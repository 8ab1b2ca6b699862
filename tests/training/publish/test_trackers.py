"""Every tracker that accelerate knows is known here; what cannot be is told before it starts, and
what fails later ends no run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_curriculum.training.arguments.environment import TRACKERS
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.publish.trackers import (
    captions,
    log_images,
    log_lines,
    mlflow_name,
    start_trackers,
    tracker_of,
)
from tests.training.command_lines import parse_args
from tests.training.fake_accelerator import FakeAccelerator

# Of MLflow's pictures and metrics: alphanumerics, underscores, dashes, periods, spaces, slashes.
ALLOWED = re.compile(r"^[/\w.\- ]*$")
NAMES = {
    "loss_log_snr/[-10,-8.5)": "loss_log_snr/-10 to -8.5",
    "count_log_snr/[8,10]": "count_log_snr/8 to 10",
    "sampler/phase1_stage": "sampler/phase1_stage",
    "lr": "lr",
}
PROMPTS = ("a b", "b a a")


class FakeTracker:
    """Records what is logged, as accelerate's trackers do; what is sent to it may fail."""

    def __init__(self, name: str, broken: bool = False) -> None:
        self.name, self.broken = name, broken
        self.logged: list[tuple[Any, ...]] = []

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.logged.append((values, step))

    def finish(self) -> None:
        self.log({})


def accelerator(*trackers: Any, main: bool = True) -> SimpleNamespace:
    return SimpleNamespace(trackers=[tracker_of(t) for t in trackers], is_main_process=main)


def coloured(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 2), (value, 0, 0)) for value in values]


def test_every_tracker_of_accelerate_is_known() -> None:
    newer = {"swanlab", "trackio"} - set(LOGGER_TYPE_TO_CLASS)  # which accelerate 1.4 lacks
    assert set(TRACKERS) - newer == set(LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize(("name", "wanted"), NAMES.items())
def test_names_are_those_that_mlflow_takes(name: str, wanted: str) -> None:
    assert mlflow_name(name) == wanted
    assert ALLOWED.match(mlflow_name(name))


def test_bins_keep_their_own_names() -> None:
    names = [f"loss_log_snr/[{low},{low + 2})" for low in range(-10, 10, 2)]
    assert len({mlflow_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_only_mlflow_changes_names(name: str) -> None:
    tracker = FakeTracker(name)
    tracker_of(tracker).log(dict.fromkeys(NAMES, 1.0), step=3)
    ((told, step),) = tracker.logged
    assert step == 3
    assert list(told) == list(NAMES.values() if name == "mlflow" else NAMES)


# -- before it starts, and while it runs -----------------------------------------------------------


def arguments(tmp_path: Path, *more: str) -> Any:
    line = ["--pretrained_model_name_or_path", "a/b", "--output_dir", str(tmp_path), *more]
    return parse_args(line, machine=False)


def test_a_tracker_that_cannot_start_is_a_usage_error(tmp_path: Path) -> None:
    fake: Any = FakeAccelerator()

    def init_trackers(project: str, config: Any) -> None:
        raise RuntimeError("no login")

    fake.init_trackers = init_trackers
    args = arguments(tmp_path, "--report_to", "wandb")
    with pytest.raises(UsageError, match=r"--report_to is wandb.*RuntimeError: no login.*none"):
        start_trackers(fake, args)
    start_trackers(FakeAccelerator(main=False), args)  # the others start none


def test_a_tracker_that_fails_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    broken, whole = FakeTracker("wandb", broken=True), FakeTracker("aim")
    both = accelerator(broken, whole)
    for step in range(3):
        for tracker in both.trackers:
            tracker.log({"loss": 1.0}, step=step)
    for tracker in both.trackers:
        tracker.finish()
    assert [step for _, step in whole.logged] == [0, 1, 2, None]
    assert [record.getMessage() for record in caplog.records] == [
        "Tracker wandb failed (ConnectionError: no network). The run goes on, and further failures "
        "are counted.",
        "Tracker wandb lacks what was sent 4 times.",
    ]


# -- pictures and text -----------------------------------------------------------------------------


def image_events(folder: Path) -> list[tuple[str, int, bytes]]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    return [(tag, e.step, e.encoded_image_string) for tag in tags for e in events.Images(tag)]


@pytest.fixture
def _accelerate_started() -> Iterator[None]:
    """accelerate's trackers log through its own loggers, which ask for its state."""
    PartialState()
    yield
    PartialState._reset_state()


@pytest.mark.usefixtures("_accelerate_started")
def test_tensorboard_receives_the_pictures(tmp_path: Path) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    images = coloured(10, 20)
    tracker = TensorBoardTracker("run", tmp_path / "sent")
    getattr(tracker, "start", lambda: None)()  # older ones of accelerate have started
    log_images(accelerator(tracker), "validation", images, PROMPTS, step=7)
    tracker.finish()
    with SummaryWriter(str(tmp_path / "by_hand")) as writer:
        stacked = np.stack([np.asarray(image) for image in images])
        writer.add_images("validation", stacked, 7, dataformats="NHWC")
    events = image_events(tmp_path / "sent" / "run")
    assert [event[:2] for event in events] == [("validation", 7)]
    assert events == image_events(tmp_path / "by_hand")


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_pictures_come_with_their_prompts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def picture(image: Any, caption: str) -> tuple[Any, str]:
        return image, caption

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(Image=picture))
    tracker, images = FakeTracker(name), coloured(1, 2, 3, 4)
    log_images(accelerator(tracker), "test", images, PROMPTS, step=9)
    ((values, step),) = tracker.logged
    assert step == 9
    texts = ["0: a b", "1: a b", "2: b a a", "3: b a a"]
    assert values == {"test": list(zip(images, texts, strict=True))}


def test_other_trackers_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    tracker = FakeTracker("csv")
    sent_to = accelerator(tracker)
    for step in range(3):
        log_images(sent_to, "validation", coloured(1), ["a"], step)
        log_lines(sent_to, "stages", ["a"], step)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("Tracker csv is sent numbers only; pictures go to tensorboard, wandb")
    assert tracker.logged == []


def test_only_the_main_process_sends() -> None:
    tracker = FakeTracker("wandb")
    others = accelerator(tracker, main=False)
    log_images(others, "validation", coloured(1), ["a"], 0)
    log_lines(others, "stages", ["a"], 0)
    assert tracker.logged == []


def test_captions_of_an_odd_number_of_pictures_name_every_prompt() -> None:
    assert captions(coloured(1, 2), PROMPTS) == ["0: a b", "1: b a a"]
    assert captions(coloured(1), ["law"]) == ["law"]
