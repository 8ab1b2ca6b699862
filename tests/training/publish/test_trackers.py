"""Every tracker that accelerate knows is known here; what cannot be is told before it starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from diffusers_curriculum.training.arguments.environment import TRACKERS
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.publish.trackers import log_metrics, mlflow_name, start_trackers
from tests.training.command_lines import parse_args
from tests.training.fake_accelerator import FakeAccelerator

# Of MLflow: alphanumerics, underscores, dashes, periods, spaces, colons and slashes.
ALLOWED = re.compile(r"^[/\w.\- :]*$")
NAMES = {
    "loss_log_snr/[-10,-8.5)": "loss_log_snr/-10 to -8.5",
    "count_log_snr/[8,10]": "count_log_snr/8 to 10",
    "sampler/phase1_stage": "sampler/phase1_stage",
    "lr": "lr",
}


def test_every_tracker_of_accelerate_is_known() -> None:
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize(("name", "wanted"), NAMES.items())
def test_names_are_those_that_mlflow_takes(name: str, wanted: str) -> None:
    assert mlflow_name(name) == wanted
    assert ALLOWED.match(mlflow_name(name))


def test_bins_keep_their_own_names() -> None:
    names = [f"loss_log_snr/[{low},{low + 2})" for low in range(-10, 10, 2)]
    assert len({mlflow_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_only_mlflow_changes_names(tracker: str) -> None:
    fake: Any = FakeAccelerator()
    fake.trackers[0].name = tracker
    log_metrics(fake, dict.fromkeys(NAMES, 1.0), 3)
    ((step, told),) = fake.logged
    assert step == 3
    assert list(told) == list(NAMES.values() if tracker == "mlflow" else NAMES)


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
