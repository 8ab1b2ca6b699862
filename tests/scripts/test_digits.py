"""The demo's digits: what is exported, what is kept apart, and how images are recognised."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.command_lines import parse_args

EXAMPLES = Path(__file__).parents[2] / "examples" / "text_to_image"


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the example's module, found as when it is run as a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("digits")


@pytest.fixture
def recognise(digits: ModuleType) -> ModuleType:
    """Return the second example's module, which imports the first."""
    return importlib.import_module("recognise")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the example that runs the others."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(EXAMPLES.parent.parent)
    return importlib.import_module("demo")


@pytest.fixture
def shell(demo: ModuleType) -> ModuleType:
    """Return what the demo runs its commands with."""
    return importlib.import_module("shell")


@pytest.fixture
def exported(digits: ModuleType, tmp_path: Path) -> Path:
    """Return a folder of exported digits."""
    digits.export(tmp_path, 32)
    return tmp_path


def _rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_export_has_every_scan_but_those_kept_apart(digits: ModuleType, exported: Path) -> None:
    rows = _rows(exported)
    assert len(rows) == 1797 - digits.HELD_OUT == len(list(exported.glob("*.png")))
    assert {row["file_name"] for row in rows} == {path.name for path in exported.glob("*.png")}
    with Image.open(exported / rows[0]["file_name"]) as image:
        assert image.size == (32, 32)


def test_kept_apart_scans_are_not_among_the_exported(digits: ModuleType) -> None:
    train, held_out = digits.split()
    assert len(train.labels) + len(held_out.labels) == 1797
    assert len(held_out.labels) == digits.HELD_OUT
    known = {scan.tobytes() for scan in train.scans}
    assert sum(scan.tobytes() in known for scan in held_out.scans) == 0
    assert set(held_out.labels) == set(range(10))


def test_captions_name_the_digit_of_their_scan(digits: ModuleType, exported: Path) -> None:
    train, _ = digits.split()
    rows = _rows(exported)
    for row, label in zip(rows, train.labels, strict=True):
        words = re.findall(r"[a-z]+|\d", row["text"])
        named = [w for w in words if w in digits.WORDS or w.isdigit()]
        assert named in ([digits.WORDS[label]], [str(label)])
    for label in range(10):
        captions = {r["text"] for r, k in zip(rows, train.labels, strict=True) if k == label}
        assert len(captions) == len(digits.PHRASINGS)


def test_exported_images_show_their_scans(digits: ModuleType, exported: Path) -> None:
    train, _ = digits.split()
    for index in (0, 700, 1499):
        with Image.open(exported / f"{index:04d}.png") as image:
            again = digits.to_scan(image)
        assert np.corrcoef(again.ravel(), train.scans[index].ravel())[0, 1] > 0.97


def test_classifier_is_right_on_scans_kept_apart(digits: ModuleType) -> None:
    _, right = digits.train_classifier()
    assert right >= 0.97


def test_classifier_survives_the_way_through_images(digits: ModuleType) -> None:
    classifier, _ = digits.train_classifier()
    _, held_out = digits.split()
    scans = [digits.to_scan(digits.to_image(scan, 32)).ravel() for scan in held_out.scans]
    assert classifier.score(np.stack(scans), held_out.labels) >= 0.97


@pytest.mark.parametrize("resolution", [0, -8, 20])
def test_resolution_must_be_a_multiple_of_the_scans_side(
    digits: ModuleType, tmp_path: Path, resolution: int
) -> None:
    with pytest.raises(ValueError, match=f"resolution={resolution}"):
        digits.export(tmp_path, resolution)


def test_judge_counts_right_digits_only(digits: ModuleType, recognise: ModuleType) -> None:
    classifier, _ = digits.train_classifier()
    _, held_out = digits.split()
    by_digit = [held_out.scans[held_out.labels == digit][:20] for digit in range(10)]
    images = [digits.to_image(scan, 32) for scans in by_digit for scan in scans]
    assert recognise.judge(images, classifier).share >= 0.95
    shifted = images[20:] + images[:20]
    assert recognise.judge(shifted, classifier).share <= 0.05


def test_picture_frames_what_was_not_recognised(recognise: ModuleType) -> None:
    images = [Image.new("L", (32, 32)) for _ in range(200)]
    right = np.ones(200, dtype=bool)
    right[21] = False  # second sample of digit 1
    picture = np.asarray(recognise.picture(recognise.Samples(images, right)))
    red = np.argwhere((picture == (255, 0, 0)).all(axis=2))
    top, left = recognise.TOP + recognise.CELL, recognise.LEFT + recognise.CELL
    assert red.min(axis=0).tolist() == [top, left]
    assert red.max(axis=0).tolist() == [top + recognise.CELL - 1, left + recognise.CELL - 1]


def test_folder_without_pipeline_is_refused(recognise: ModuleType, tmp_path: Path, capsys) -> None:
    words = ["--before", str(tmp_path), "--after", str(tmp_path), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        recognise.main(words)
    assert stop.value.code == 2
    assert "model_index.json" in capsys.readouterr().err


def _training_arguments(demo: ModuleType, folder: Path) -> argparse.Namespace:
    """Return the demo's training flags as the script reads them, which looks at the folders."""
    for name in ("digits", "tiny-sd"):
        (folder / name).mkdir()
        (folder / name / "metadata.jsonl").touch()
    train = demo.commands(folder, demo.TRAIN_STEPS, demo.VAE_STEPS)[2]
    return parse_args(train[train.index(demo.SCRIPT.name) + 1 :])


def test_demo_trains_with_flags_the_script_accepts(demo: ModuleType, tmp_path: Path) -> None:
    export, make_tiny, _, compare = demo.commands(tmp_path, demo.TRAIN_STEPS, demo.VAE_STEPS)
    args = _training_arguments(demo, tmp_path)
    assert args.train_data_dir == export[export.index("--output_dir") + 1]
    tiny = make_tiny[make_tiny.index("--output_dir") + 1]
    assert args.pretrained_model_name_or_path == tiny == compare[compare.index("--before") + 1]
    assert args.output_dir == compare[compare.index("--after") + 1]
    assert f"{args.output_dir}-uniform" == compare[compare.index("--uniform") + 1]
    assert (args.timestep_sampler, args.timestep_draw) == ("laplace", "stratified")
    assert args.curriculum == "difficulty"


def test_demo_curriculum_ends_well_before_its_training(demo: ModuleType, tmp_path: Path) -> None:
    args = _training_arguments(demo, tmp_path)
    # On a plateau a stage lasts 1.7811 times the patience (exp of Euler's constant).
    expected = (args.curriculum_clusters - 1) * 1.7811 * args.curriculum_patience
    assert expected < 0.3 * args.max_train_steps


def test_demo_stops_at_the_first_command_that_fails(shell: ModuleType, capfd) -> None:
    with pytest.raises(SystemExit, match="status 3"):
        shell.run(["python", "-c", "raise SystemExit(3)"])
    assert "$ python -c 'raise SystemExit(3)'" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="'no-such-tool' is not installed"):
        shell.run(["no-such-tool"])


def test_a_twin_runs_beside_its_training_and_fails_with_it(shell: ModuleType, capfd) -> None:
    quick, slow = (["python", "-c", code] for code in ("print('first')", "print('twin')"))
    shell.run(quick, slow)
    told = capfd.readouterr().out
    assert "$ python -c 'print('\"'\"'twin'\"'\"')' &" in told
    assert told.count("twin") == 1  # in the command alone
    with pytest.raises(SystemExit, match="status 4"):
        shell.run(quick, ["python", "-c", "print('why'); raise SystemExit(4)"])
    assert "\nwhy" in capfd.readouterr().out
    start = time.monotonic()
    with pytest.raises(SystemExit, match="status 3"):
        shell.run(["python", "-c", "raise SystemExit(3)"], ["sleep", "60"])
    assert time.monotonic() - start < 30


def test_the_twin_differs_in_its_timesteps_alone(
    demo: ModuleType, shell: ModuleType, tmp_path: Path
) -> None:
    commands = demo.commands(tmp_path, demo.TRAIN_STEPS, demo.VAE_STEPS)
    twins = [shell.uniform_twin(command) for command in commands]
    assert [twin is not None for twin in twins] == [False, False, True, False]
    args = vars(_training_arguments(demo, tmp_path))
    twin = vars(parse_args(twins[2][twins[2].index(demo.SCRIPT.name) + 1 :]))
    named = {name for name in args if args[name] != twin[name]} - {"given"}
    assert {name for name in named if not name.startswith(("timestep_", "curriculum"))} == {
        "output_dir"
    }
    assert (twin["timestep_sampler"], twin["curriculum"]) == ("uniform", "none")
    assert twin["max_train_steps"] == demo.TRAIN_STEPS


@pytest.mark.parametrize("uniform", [False, True])
def test_the_figures_of_the_baseline_stand_beside_the_others(
    recognise: ModuleType, digits: ModuleType, tmp_path: Path, uniform: bool, monkeypatch: Any
) -> None:
    train, _ = digits.split()
    scans = [train.scans[train.labels == digit][:5] for digit in range(10)]
    right = [digits.to_image(scan, 32) for group in scans for scan in group]
    drawn = {"b": right[5:] + right[:5], "a": right, "u": right[:25] + right[30:] + right[25:30]}
    monkeypatch.setattr(recognise, "generate", lambda folder, *a, **k: drawn[folder])
    given = argparse.Namespace(before="b", after="a", uniform="u" if uniform else None)
    given.output_dir, given.samples, given.num_inference_steps, given.seed = tmp_path, 5, 1, 0
    told = recognise.recognise(given)
    baseline = "uniform=0.50 " if uniform else ""
    assert told.startswith(f"recognised before=0.00 after=1.00 {baseline}n=50 classifier=")
    assert (tmp_path / "digits_uniform.png").exists() == uniform
