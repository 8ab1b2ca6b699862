"""How a process starts and ends: exit statuses, one seed for all, and what may not be resumed."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub.utils import tqdm as hub_tqdm
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from tqdm import tqdm

from diffusers_curriculum.models.image_files import Listing, warn_of_left_out
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import (
    CheckpointError,
    DiskFullError,
    HubError,
    NonFiniteError,
    UsageError,
)
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.process.launcher import (
    check_environment,
    check_in_effect,
    in_effect,
)
from tests.training.command_lines import parse_args
from tests.training.fake_accelerator import FakeAccelerator


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """No accelerator before, and none left behind."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, 0),
        (UsageError("wrong"), 2),
        (CheckpointError("damaged"), 2),
        (HubError("refused"), 2),
        (NonFiniteError("NaN"), 3),
        (DiskFullError(Path("here"), 10, 5, "full"), 4),
    ],
)
def test_exit_statuses(
    error: Exception | None, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        if error is not None:
            raise error

    assert runtime.exit_status(run) == expected
    told = capsys.readouterr()
    assert told.err == ("" if error is None else f"error: {error}\n")
    assert told.out == ""


def test_torchs_launcher_is_given_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        raise UsageError("--flag is wrong")

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert runtime.exit_status(run) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    told = ChildFailedError("script", {0: failure}).format_msg().strip().splitlines()
    assert told[-2].endswith("error: --flag is wrong")
    file.unlink()
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--no_such_flag")
    assert "--no_such_flag" in json.loads(file.read_text())["message"]["message"]


def test_the_flag_wins_over_the_launchers_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    accelerator = runtime.make_accelerator(arguments(tmp_path, "--mixed_precision", "bf16"))
    assert in_effect(accelerator)["mixed_precision"] == "bf16"
    assert in_effect(accelerator)["autocast"] is True


def test_what_accelerate_takes_amiss_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "warp")
    with pytest.raises(UsageError, match=r"accelerate cannot be set up: .*accelerate config"):
        runtime.make_accelerator(arguments(tmp_path))


def test_a_flag_that_accelerate_did_not_take_over_is_found(tmp_path: Path) -> None:
    fake: Any = FakeAccelerator()
    fake.gradient_accumulation_steps = 3
    with pytest.raises(UsageError, match=r"gradient_accumulation_steps is 1.*set up with 3"):
        check_in_effect(arguments(tmp_path), fake)


def test_another_experiment_of_mlflow_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, "--report_to", "mlflow", "--tracker_project_name", "a")
    check_environment(args, {"MLFLOW_EXPERIMENT_NAME": "a"})
    with pytest.raises(UsageError, match="MLFLOW_EXPERIMENT_NAME is 'b', but --tracker_project"):
        check_environment(args, {"MLFLOW_EXPERIMENT_NAME": "b"})
    check_environment(arguments(tmp_path), {"MLFLOW_EXPERIMENT_NAME": "b"})


@pytest.mark.parametrize("error", [ValueError("ours"), OSError("theirs"), KeyboardInterrupt()])
def test_other_errors_keep_their_traceback(error: BaseException) -> None:
    def run() -> None:
        raise error

    with pytest.raises(type(error)):
        runtime.exit_status(run)


def arguments(tmp_path: Path, *more: str) -> Arguments:
    line = ["--pretrained_model_name_or_path", "a/b", "--output_dir", str(tmp_path), *more]
    return parse_args(line, machine=False)


def test_the_accelerator_follows_the_command_line(tmp_path: Path) -> None:
    more = ("--gradient_accumulation_steps", "3", "--mixed_precision", "bf16")
    accelerator = runtime.make_accelerator(arguments(tmp_path, *more))
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.project_configuration.logging_dir == str(tmp_path / "logs")
    assert runtime.frozen_dtype(accelerator) == torch.bfloat16


def test_one_process_of_a_machine_says_what_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    found = Listing(["/data/a.png", "/data/b.png"], [], {}, [])
    for main in (False, True):
        runtime._set_up_logging(FakeAccelerator(main))  # pyright: ignore
        warn_of_left_out("/data", found, ["/data/a.png"])
        assert len(caplog.messages) == main


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("no", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_frozen_models_take_the_launchers_precision(precision: str, expected: torch.dtype) -> None:
    accelerator: Any = FakeAccelerator()
    accelerator.mixed_precision = precision
    assert runtime.frozen_dtype(accelerator) == expected


@pytest.fixture
def tf32() -> Iterator[Any]:
    """The switches, off before and as they were afterwards."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield switches
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.parametrize("wanted", [False, True])
def test_tf32_is_a_choice(tmp_path: Path, tf32: Any, wanted: bool) -> None:
    runtime.make_accelerator(arguments(tmp_path, *(["--allow_tf32"] if wanted else [])))
    assert [switch.allow_tf32 for switch in tf32] == [wanted, wanted]


def test_libraries_are_quieted(tmp_path: Path) -> None:
    logging.getLogger("httpx").setLevel(logging.INFO)
    runtime.make_accelerator(arguments(tmp_path))
    assert logging.getLogger("httpx").level == logging.WARNING


@pytest.mark.parametrize("library", ["transformers", "diffusers", "datasets", "py.warnings"])
def test_lines_of_libraries_come_above_the_bars(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    logger = logging.getLogger(library)
    own = logging.StreamHandler(stream)
    logger.addHandler(own)
    logger.propagate = False if library != "py.warnings" else logger.propagate
    root = runtime._AboveBars(stream)
    logging.getLogger().addHandler(root)
    try:
        runtime.make_accelerator(arguments(tmp_path))
        if library == "py.warnings":
            logger.removeHandler(own)
        with tqdm(total=3, file=stream):
            logger.warning("a line")
    finally:
        logging.getLogger().removeHandler(root)
        logger.removeHandler(own)
    assert stream.getvalue().count("a line") == 1
    assert "\ra line\n\r" in stream.getvalue()


def test_no_tracker_is_a_choice(tmp_path: Path) -> None:
    accelerator = runtime.make_accelerator(arguments(tmp_path, "--report_to", "none"))
    assert accelerator.log_with == []
    accelerator.init_trackers("project", {})
    accelerator.log({"x": 1.0}, step=1)
    accelerator.end_training()


def test_a_given_seed_is_taken() -> None:
    assert runtime.agree_on_seed(5, None) == 5
    assert runtime.agree_on_seed(0, None) == 0


def test_without_a_seed_each_run_has_its_own() -> None:
    seeds = {runtime.agree_on_seed(None, None) for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("seed", [None, 7])
def test_a_resumed_run_keeps_its_seed(seed: int | None) -> None:
    assert runtime.agree_on_seed(seed, {"seed": 7}) == 7


@pytest.mark.parametrize("seed", [0, 8])
def test_a_resumed_run_refuses_another_seed(seed: int) -> None:
    with pytest.raises(UsageError, match=rf"--seed is {seed}.*--seed 7"):
        runtime.agree_on_seed(seed, {"seed": 7})
    assert runtime.agree_on_seed(seed, {"seed": 7}, ["seed"]) == seed


@pytest.mark.parametrize("main", [True, False])
def test_one_process_prepares_the_output_folder(tmp_path: Path, main: bool) -> None:
    accelerator: Any = FakeAccelerator(main)
    cleaned: list[str] = []
    folder = tmp_path / "a" / "b"
    runtime.prepare_output(accelerator, str(folder), cleaned.append)
    assert folder.is_dir() == main
    assert cleaned == ([str(folder)] if main else [])
    assert accelerator.waits == 1


def test_the_run_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        runtime.log_run({"examples": 12, "seed": 3})
    assert [r.message.strip() for r in caplog.records[1:]] == ["examples = 12", "seed = 3"]


def logged_beside_a_bar(handler: type[logging.StreamHandler]) -> str:
    stream = io.StringIO()
    record = logging.LogRecord("x", logging.INFO, "x", 1, "a line", None, None)
    with tqdm(total=3, file=stream):
        handler(stream).emit(record)
    return stream.getvalue()


def test_log_lines_do_not_run_into_bars() -> None:
    assert "\ra line\n\r" in logged_beside_a_bar(runtime._AboveBars)
    assert "\ra line" not in logged_beside_a_bar(logging.StreamHandler)


def test_workers_leave_the_lock_of_bars_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.parent_process", object)
    monkeypatch.setattr(tqdm, "external_write_mode", None)
    assert "a line\n" in logged_beside_a_bar(runtime._AboveBars)


def test_bars_of_other_threads_lose_no_log_line() -> None:
    """As when the client of the Hub logs from the threads that upload, each with a bar."""
    stream = io.StringIO()
    handler, stopped = runtime._AboveBars(stream), threading.Event()

    def draw_bars() -> None:
        while not stopped.is_set():
            for bar in [hub_tqdm(total=1, file=io.StringIO()) for _ in range(20)]:
                bar.close()

    threads = [threading.Thread(target=draw_bars) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for line in range(2000):
            handler.emit(logging.LogRecord("x", logging.INFO, "x", 1, f"[{line}]", None, None))
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert [f"[{line}]" in stream.getvalue() for line in range(2000)] == [True] * 2000
