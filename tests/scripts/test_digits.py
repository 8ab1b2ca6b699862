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

from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora
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
def curves(recognise: ModuleType) -> ModuleType:
    """Return the example's module that compares checkpoints."""
    return importlib.import_module("learning_curve")


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
    commands = demo.commands(tmp_path, demo.TRAIN_STEPS, demo.VAE_STEPS)
    export, make_tiny, _, compare, curve = commands
    args = _training_arguments(demo, tmp_path)
    assert args.train_data_dir == export[export.index("--output_dir") + 1]
    tiny = make_tiny[make_tiny.index("--output_dir") + 1]
    assert args.pretrained_model_name_or_path == tiny == compare[compare.index("--before") + 1]
    assert args.output_dir == compare[compare.index("--after") + 1]
    assert f"{args.output_dir}-uniform" == compare[compare.index("--uniform") + 1]
    assert args.output_dir == curve[curve.index("--run") + 1]
    assert f"{args.output_dir}-uniform" == curve[curve.index("--uniform") + 1]
    assert (args.timestep_sampler, args.timestep_draw) == ("laplace", "stratified")
    assert args.curriculum == "difficulty"
    assert args.max_train_steps == demo.CHECKPOINTS * args.checkpointing_steps


def test_demo_curriculum_ends_well_before_its_training(demo: ModuleType, tmp_path: Path) -> None:
    args = _training_arguments(demo, tmp_path)
    # On a plateau a stage lasts 1.7811 times the patience (exp of Euler's constant).
    expected = (args.curriculum_clusters - 1) * 1.7811 * args.curriculum_patience
    assert expected < 0.3 * args.max_train_steps


def test_demo_stops_at_the_first_command_that_fails(shell: ModuleType, capfd) -> None:
    with pytest.raises(SystemExit, match="status 3"):
        shell.run(["python", "-c", "raise SystemExit(3)"])
    assert "$ python -c 'raise SystemExit(3)'" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="'no-such-tool' is missing: pip install"):
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
    assert [twin is not None for twin in twins] == [False, False, True, False, False]
    args = vars(_training_arguments(demo, tmp_path))
    twin = vars(parse_args(twins[2][twins[2].index(demo.SCRIPT.name) + 1 :]))
    named = {name for name in args if args[name] != twin[name]} - {"given", "configuration"}
    assert {name for name in named if not name.startswith(("timestep_", "curriculum"))} == {
        "output_dir"
    }
    assert (twin["timestep_sampler"], twin["curriculum"]) == ("uniform", "none")
    assert twin["max_train_steps"] == demo.TRAIN_STEPS


# -- LoRA ------------------------------------------------------------------------------------------


@pytest.fixture
def demo_lora(demo: ModuleType) -> ModuleType:
    """Return the example that teaches digits by LoRA, and runs parts of the other one."""
    return importlib.import_module("demo_lora")


def test_some_digits_alone_are_exported(digits: ModuleType, tmp_path: Path) -> None:
    parts = ["0 1 2 3 4", "5 6 7 8 9"]
    for number, part in enumerate(parts):
        words = ["--output_dir", str(tmp_path / str(number)), "--resolution", "8", "--digits"]
        digits.main([*words, *part.split()])
    train, _ = digits.split()
    old, new = ({row["file_name"] for row in _rows(tmp_path / str(k))} for k in range(2))
    assert len(old) == (train.labels < 5).sum()
    assert len(new) == (train.labels >= 5).sum()
    assert not old & new
    texts = " ".join(row["text"] for row in _rows(tmp_path / "1"))
    assert "seven" in texts
    assert "three" not in texts


@pytest.mark.parametrize(
    ("more", "told"), [(("--digits", "10"), "--digits 10"), (("--by_class",), "--by_class")]
)
def test_digits_that_are_none_are_refused(
    digits: ModuleType, tmp_path: Path, more: tuple[str, ...], told: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        digits.main(["--output_dir", str(tmp_path), "--digits", "1", *more])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_the_adapter_is_trained_on_what_the_base_has_not_seen(
    demo_lora: ModuleType, shell: ModuleType, tmp_path: Path
) -> None:
    commands = demo_lora.commands(tmp_path, 900, 700, 250)
    _, old, new, tiny, train, adapt, compare = commands
    twins = [shell.uniform_twin(command) for command in commands]
    assert [twin is not None for twin in twins] == [False] * 5 + [True, False]
    assert old[old.index("--digits") + 1 :] == list("01234")
    assert new[new.index("--digits") + 1 :] == list("56789")
    folder = {
        name: Path(words[words.index("--output_dir") + 1])
        for name, words in {
            "old": old,
            "new": new,
            "tiny": tiny,
            "base": train,
            "lora": adapt,
        }.items()
    }
    for name in ("old", "new", "tiny", "base"):
        folder[name].mkdir()
        (folder[name] / "metadata.jsonl").touch()
    base = parse_args(train[train.index(demo_lora.demo.SCRIPT.name) + 1 :])
    assert (base.train_data_dir, base.output_dir) == (str(folder["old"]), str(folder["base"]))
    assert (base.max_train_steps, base.timestep_sampler, base.curriculum) == (
        900,
        "uniform",
        "none",
    )
    args = TextToImageLora().parse(adapt[_script(adapt) + 1 :], machine=False)
    assert args.pretrained_model_name_or_path == str(folder["base"])
    assert (args.train_data_dir, args.max_train_steps) == (str(folder["new"]), 700)
    assert (args.timestep_sampler, args.curriculum, args.rank) == ("laplace", "difficulty", 16)
    expected = (args.curriculum_clusters - 1) * 1.7811 * args.curriculum_patience
    assert expected < 0.3 * args.max_train_steps
    twin = TextToImageLora().parse(twins[5][_script(twins[5]) + 1 :], machine=False)
    assert (twin.timestep_sampler, twin.curriculum, twin.rank) == ("uniform", "none", 16)
    given = {words[0]: words[1:] for words in shell._groups(compare)[1:]}
    assert given["--before"] == [str(folder["base"])]
    assert given["--after"] + given["--uniform"] == [args.output_dir, twin.output_dir]
    assert given["--learned"] == list("56789")


def _script(command: list[str]) -> int:
    (place,) = [i for i, word in enumerate(command) if "train_text_to_image" in word]
    return place


def test_a_changed_command_has_what_was_asked_for(shell: ModuleType) -> None:
    command = ["python", "x.py", "--a", "1", "2", "--b", "--c", "3"]
    changed = shell.changed(command, a=["4"], b=None, d=["5", "6"])
    assert changed == ["python", "x.py", "--c", "3", "--a", "4", "--d", "5", "6"]
    assert shell.changed(command) == command


def test_shares_of_the_new_and_of_the_old_digits(recognise: ModuleType) -> None:
    blank = [Image.new("L", (8, 8))] * 20
    right = np.repeat([True, False], [10, 10])  # two of each: 0 to 4 are right, the others not
    right[18] = True  # one nine
    drawn = {"after": recognise.Samples(blank, right)}
    lines = recognise.by_part(drawn, [5, 6, 7, 8, 9])
    assert lines == ["of the learned digits after=0.10", "of the other digits after=1.00"]
    assert recognise.by_part(drawn, ()) == []


@pytest.mark.reliability
def test_an_adapter_draws_in_its_base(recognise: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers", minversion="5")  # which saved the base
    from tests.training.parts.test_adapters import PIPELINE, adapted, trained

    adapter = trained(adapted(rank=2))
    adapter.save_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    assert recognise.is_adapter(str(tmp_path))
    assert not recognise.is_adapter(str(PIPELINE))
    assert not recognise.is_adapter(str(tmp_path / "empty"))
    settings: dict[str, Any] = {"base": str(PIPELINE), "steps": 2, "seed": 0}
    with_it, without = (
        recognise.generate(str(folder), ["picture"], **settings) for folder in (tmp_path, PIPELINE)
    )
    assert np.abs(np.asarray(with_it[0], int) - np.asarray(without[0], int)).max() > 3


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
    given.learned = None
    given.output_dir, given.samples, given.num_inference_steps, given.seed = tmp_path, 5, 1, 0
    told = recognise.recognise(given)
    baseline = "uniform=0.50 " if uniform else ""
    assert told.startswith(f"recognised before=0.00 after=1.00 {baseline}n=50 classifier=")
    assert (tmp_path / "digits_uniform.png").exists() == uniform


def test_steps_are_read_between_checkpoints(curves: ModuleType) -> None:
    curve = [(100, 0.2), (200, 0.6), (300, 0.5), (400, 0.9)]
    assert [curves.steps_to(curve, share) for share in (0.1, 0.4, 0.7)] == [100, 150, 350]
    assert curves.steps_to(curve, 0.95) is None


def test_both_outcomes_of_a_comparison_are_told(curves: ModuleType) -> None:
    slow, quick = [(100, 0.1), (200, 0.5)], [(100, 0.5), (200, 0.9)]
    told = curves.in_words(quick, slow).splitlines()
    assert told[:2] == ["run      100:0.50 200:0.90", "uniform  100:0.10 200:0.50"]
    assert told[2] == "0.50, uniform's after 200 steps, is reached after 100: 2.00 times fewer"
    assert "never recognises uniform's 0.90" in curves.in_words(slow, quick)


def test_checkpoints_are_judged_in_their_order(
    curves: ModuleType, digits: ModuleType, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    train, _ = digits.split()
    scans = [train.scans[train.labels == digit][:5] for digit in range(10)]
    right = [digits.to_image(scan, 32) for group in scans for scan in group]
    half = right[:25] + right[30:] + right[25:30]
    for run in ("a", "u"):
        for step in (1000, 200):
            (tmp_path / run / f"checkpoint-{step}").mkdir(parents=True)
    monkeypatch.setattr(curves, "load_model", lambda kind, folder, subfolder: Path(folder))
    drawn = {"200": half, "1000": right}
    monkeypatch.setattr(curves, "generate", lambda *a, unet, **k: drawn[unet.name.split("-")[1]])
    words = ["--run", str(tmp_path / "a"), "--uniform", str(tmp_path / "u")]
    curves.main([*words, "--output_dir", str(tmp_path), "--samples", "5"])
    assert capsys.readouterr().out.startswith("run      200:0.50 1000:1.00\nuniform  200:0.50")
    with Image.open(tmp_path / "learning_curve.png") as picture:
        assert picture.width > 600


def test_a_run_without_checkpoints_is_refused(
    curves: ModuleType, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        curves.main([*("--run", "nowhere", "--uniform", "nowhere"), "--output_dir", str(tmp_path)])
    assert "--checkpointing_steps" in capsys.readouterr().err
