"""What trackers keep of a curriculum, read back from their own files: curves per noise level, where
its stages began, pictures of the law. Of those that are installed; each runs by itself, without a
network. ``pip install wandb trackio mlflow comet_ml`` runs them all.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_curriculum.training.publish.trackers import mlflow_name
from tests.training.publish import tracker_driver

ROOT = Path(__file__).parents[3]
TEXT = "curriculum/stages"


class Told(NamedTuple):
    """What a tracker kept: numbers by name and step, steps by the name of a picture, text."""

    numbers: dict[str, dict[int, float]]
    pictures: dict[str, list[int]]
    text: str


def of_rows(rows: list[tuple[int, str, float]]) -> dict[str, dict[int, float]]:
    numbers: dict[str, dict[int, float]] = defaultdict(dict)
    for step, name, value in rows:
        numbers[name][step] = value
    return numbers


def tensorboard(folder: Path) -> Told:
    events = EventAccumulator(
        str(folder / "logs" / tracker_driver.PROJECT), size_guidance={"images": 0}
    ).Reload()
    tags = events.Tags()
    rows = [(e.step, tag, e.value) for tag in tags["scalars"] for e in events.Scalars(tag)]
    pictures = {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}
    (told,) = events.Tensors(f"{TEXT}/text_summary")
    return Told(of_rows(rows), pictures, told.tensor_proto.string_val[0].decode())


def wandb(folder: Path) -> Told:
    (file,) = folder.glob("work/wandb/offline-run-*/run-*.wandb")
    rows, pictures, text = [], defaultdict(list), ""
    for items in wandb_history(file.read_bytes()):
        step = int(items["_step"])
        for name, value in items.items():
            if name.endswith("/filenames"):
                names = [name.removesuffix("/filenames")] * len(value)
                if len(names) > 1:
                    names = [f"{each}/{number}" for number, each in enumerate(names)]
                for each in names:
                    pictures[each].append(step)
            elif isinstance(value, int | float):
                rows.append((step, name, value))
        if f"{TEXT}/path" in items:
            text = (file.parent / "files" / items[f"{TEXT}/path"]).read_text()
    return Told(of_rows(rows), pictures, text)


def wandb_history(data: bytes) -> Iterator[dict[str, Any]]:
    """Rows of a file in LevelDB's format: blocks of 32 KiB, records with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            read, record = Record.FromString(record), b""
            if read.WhichOneof("record_type") == "history":
                names = {item.key or "/".join(item.nested_key): item for item in read.history.item}
                yield {name: json.loads(item.value_json) for name, item in names.items()}


def trackio(folder: Path) -> Told:
    rows, pictures, text = [], defaultdict(list), ""
    with sqlite3.connect(folder / "trackio" / f"{tracker_driver.PROJECT}.db") as database:
        for step, line in database.execute("select step, metrics from metrics"):
            for name, value in json.loads(line).items():
                kind = value["_type"] if isinstance(value, dict) else None
                if kind is None:
                    rows.append((step, name, value))
                elif kind == "trackio.image":
                    assert (folder / "trackio" / "media" / value["file_path"]).is_file()
                    pictures[name].append(step)
                elif kind == "trackio.markdown":
                    text = value["_value"]
    return Told(of_rows(rows), pictures, text)


def mlflow(folder: Path) -> Told:
    with sqlite3.connect(folder / "mlflow.db") as database:
        found = database.execute("select step, key, value from metrics").fetchall()
    (artifacts,) = folder.glob("work/mlruns/*/*/artifacts")
    pictures: dict[str, list[int]] = defaultdict(list)
    for file in sorted((artifacts / "images").glob("*.png")):
        name, _, step, *_ = file.name.split("+")
        pictures[name.replace("~", "/")].append(int(step))
    return Told(of_rows(found), pictures, (artifacts / f"{TEXT}.md").read_text())


def comet_ml(folder: Path) -> Told:
    (file,) = (folder / "comet").glob("*.zip")
    rows, pictures, text = [], defaultdict(list), ""
    with zipfile.ZipFile(file) as archive:
        for message in map(json.loads, archive.read("messages.json").splitlines()):
            payload = message["payload"]
            if message["type"] == "metric_msg":
                metric = payload["metric"]
                rows.append((metric["step"], metric["metricName"], metric["metricValue"]))
            elif payload.get("upload_type") == "visualization":
                sent = payload["additional_params"]
                pictures[sent["figName"]].append(sent["step"])
            elif payload.get("upload_type") == "text-sample":
                assert payload["metadata"] == {"tag": TEXT}
                text = archive.read(payload["file_path"]).decode()
    return Told(of_rows(rows), pictures, text)


READERS: dict[str, Callable[[Path], Told]] = {
    read.__name__: read for read in (tensorboard, wandb, trackio, mlflow, comet_ml)
}


def environment(folder: Path) -> dict[str, str]:
    """Everything stays in the folder."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(folder / "comet"),
    }


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_keeps_curves_stages_and_pictures(tracker: str, tmp_path: Path) -> None:
    if find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    if tracker == "tensorboard":
        names = tracker_driver.tell(tracker, tmp_path)
    else:
        (tmp_path / "work").mkdir()
        command = [sys.executable, "-m", tracker_driver.__name__, tracker, str(tmp_path)]
        work, told = tmp_path / "work", environment(tmp_path)
        done = subprocess.run(command, cwd=work, env=told, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "failed" not in done.stderr.replace("Failed to load", "")
        names = json.loads((tmp_path / "names.json").read_text())
    numbers, pictures, text = READERS[tracker](tmp_path)

    known = {mlflow_name(name) if tracker == "mlflow" else name for name in names}
    assert known <= numbers.keys()
    by_level = {name for name in known if name.startswith("loss_log_snr/")}
    assert len(by_level) > 4
    assert {step for name in by_level for step in numbers[name]} == {2, 4, 6}
    assert numbers["train_loss"] == {2: 1.5, 4: 3.5, 6: 5.5}
    assert numbers["curriculum/stage"] == {2: 1, 4: 2, 6: 2}  # the third step is the first of it
    assert "stage 1 of 2 since step 0" in text
    assert "stage 2 of 2 since step 3: log-SNR -5.36 to 7.07, new cluster 0" in text
    # TensorBoard gets both in one
    both = ["validation"] if tracker == "tensorboard" else ["validation/0", "validation/1"]
    assert pictures == {
        "law": [4],  # of the stage, and of the validation
        "timesteps": [6],
        "loss_per_noise_level": [6],
        **{name: [4] for name in both},
    }
