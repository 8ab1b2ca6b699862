"""The class demo: its commands, its folders by class, and how it judges."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.training.command_lines import parse_class_args

EXAMPLES = Path(__file__).parents[2] / "examples"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the example, found as when it is run as a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "text_to_image"))
    monkeypatch.chdir(EXAMPLES.parent)
    path = EXAMPLES / "class_conditional" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"class_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("latents", ["kl", "vit_vqgan"])
def test_the_demo_trains_with_flags_the_script_accepts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, latents: str
) -> None:
    demo = module("demo", monkeypatch)
    export, make, train, judge = demo.commands(tmp_path, latents, demo.TRAIN_STEPS)
    (tmp_path / "digits" / "0").mkdir(parents=True)
    (tmp_path / "digits" / "0" / "a.png").touch()
    (tmp_path / "autoencoder").mkdir()
    args = parse_class_args(train[train.index(demo.short(demo.SCRIPT)) + 1 :])
    assert args.train_data_dir == export[export.index("--output_dir") + 1]
    made = make[make.index("--output_dir") + 1]
    assert args.pretrained_vae_model_name_or_path == made
    assert args.output_dir == judge[judge.index("--pipeline") + 1]
    twin = importlib.import_module("shell").uniform_twin(train)
    uniform = parse_class_args(twin[twin.index(demo.short(demo.SCRIPT)) + 1 :])
    assert uniform.output_dir == judge[judge.index("--uniform") + 1] != args.output_dir
    assert (uniform.timestep_sampler, uniform.curriculum) == ("uniform", "none")
    assert uniform.max_train_steps == args.max_train_steps
    assert (args.timestep_sampler, args.curriculum) == ("laplace", "difficulty")
    # On a plateau a stage lasts 1.7811 times the patience (exp of Euler's constant).
    expected = (args.curriculum_clusters - 1) * 1.7811 * args.curriculum_patience
    assert expected < 0.3 * args.max_train_steps


def test_the_autoencoder_is_trained_as_its_readme_says(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = module("demo", monkeypatch)
    command = demo.make_vit_vqgan("digits/train", "digits/held_out", "vit-vqgan-digits")
    readme = (EXAMPLES / "autoencoder" / "README.md").read_text("utf-8")
    told = readme.split("launch examples/autoencoder/train_vit_vqgan.py", 1)[1].split("```")[0]
    assert sorted(command[2:]) == sorted(told.replace("\\\n", " ").split())


def test_export_by_class_has_a_folder_per_digit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "text_to_image"))
    digits = importlib.import_module("digits")
    assert digits.export_by_class(tmp_path / "train", 16) == 1500
    assert digits.export_by_class(tmp_path / "rest", 16, held_out=True) == digits.HELD_OUT
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == [
        f"{digit}_{word}" for digit, word in enumerate(digits.WORDS)
    ]
    train, held_out = digits.split()
    for name, scans in (("train", train), ("rest", held_out)):
        for digit, word in enumerate(digits.WORDS):
            files = list((tmp_path / name / f"{digit}_{word}").glob("*.png"))
            assert len(files) == int((scans.labels == digit).sum())
            with Image.open(files[0]) as image:
                again = digits.to_scan(image)
            wanted = scans.scans[int(files[0].stem)]
            assert np.corrcoef(again.ravel(), wanted.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("uniform", [False, True])
def test_the_judge_loads_both_kinds_of_pipeline_and_counts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    uniform: bool,
) -> None:
    judge = module("recognise_classes", monkeypatch)
    digits = importlib.import_module("digits")
    train, _ = digits.split()

    class Perfect:
        """Draws real scans of the class that it is asked for."""

        def __call__(self, class_labels: list[int], **options: object) -> object:
            assert options["guidance_scale"] == 1.5
            scans = train.scans[train.labels == class_labels[0]][: len(class_labels)]
            images = [digits.to_image(scan, 32) for scan in scans]
            return type("Output", (), {"images": images})

    class Poor(Perfect):
        """Draws zeros whatever the class."""

        def __call__(self, class_labels: list[int], **options: object) -> object:
            return super().__call__([0] * len(class_labels), **options)

    monkeypatch.setattr(judge, "load", lambda folder: Poor() if folder == "u" else Perfect())
    words = ["--pipeline", "x", "--output_dir", str(tmp_path), "--samples", "5"]
    assert judge.main([*words, "--uniform", "u"] if uniform else words) == 0
    baseline = "uniform=0.10 " if uniform else ""
    told = capsys.readouterr().out
    assert told.startswith(f"recognised after=1.00 {baseline}n=50 guidance=1.5 classifier=")
    with Image.open(tmp_path / "digits_by_class.png") as grid:
        assert grid.height > grid.width / 2
