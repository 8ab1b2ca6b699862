"""Wrong command lines of the image scripts, and --show_timesteps, which needs nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.arguments import environment as environment_checks
from diffusers_curriculum.training.data import sources
from diffusers_curriculum.training.loop import job
from diffusers_curriculum.training.parts import images as image_components
from diffusers_curriculum.training.process import runtime
from diffusers_curriculum.training.tasks import images as image_task
from tests.scripts.image_runs import (
    CLASS_SCRIPT,
    UNCONDITIONAL_SCRIPT,
    Materials,
    load_pipeline,
    make_materials,
)
from tests.scripts.small_runs import TINY_DIT, TINY_UNET, status, train, write_images, write_json

ROOT = Path(__file__).parents[2]
SCRIPTS = {"class": CLASS_SCRIPT, "unconditional": UNCONDITIONAL_SCRIPT}
CONFIG = {"class": "--model_config", "unconditional": "--model_config_name_or_path"}
VAE = "--pretrained_vae_model_name_or_path"
PIPELINE = "--pretrained_model_name_or_path"
RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """What runs are made of; a run of each script to resume; data that cannot be trained on."""
    torch.set_num_threads(1)
    made = make_materials(tmp_path_factory.mktemp("materials"))
    folder = made.folder
    write_json(folder / "odd.json", TINY_DIT | {"patch_size": 3})
    write_json(folder / "two.json", TINY_UNET | {"in_channels": 2})
    write_json(folder / "alpha.json", TINY_UNET | {"in_channels": 4})
    write_json(folder / "few.json", TINY_UNET | {"num_class_embeds": 3})
    (folder / "empty").mkdir()
    write_images(folder / "bare", 4)
    (folder / "bare" / "metadata.jsonl").unlink()
    unlabelled = write_images(folder / "unlabelled", 4) / "metadata.jsonl"
    rows = [json.loads(line) for line in unlabelled.read_text().splitlines()]
    rows[2]["label"] = -1
    unlabelled.write_text("\n".join(map(json.dumps, rows)))
    more = shutil.copytree(folder / "images", folder / "more") / "metadata.jsonl"
    rows = [json.loads(line) for line in more.read_text().splitlines()]
    more.write_text("\n".join(json.dumps(row | {"label": i % 4}) for i, row in enumerate(rows)))
    relabelled = shutil.copytree(folder / "images", folder / "relabelled") / "metadata.jsonl"
    relabelled.write_text("\n".join(json.dumps(row | {"label": 2 - row["label"]}) for row in rows))
    for name, script in SCRIPTS.items():
        kind, space = ("dit", "AutoencoderKL") if name == "class" else ("unet", "pixels")
        argv = made.argv(folder / f"{name}_run", script, kind, space, "--max_train_steps", 1)
        argv += ["--checkpointing_steps", "1"] + (["--cache_latents"] if name == "class" else [])
        train(argv, script=script)
    edm = made.argv(folder / "edm_run", UNCONDITIONAL_SCRIPT, "unet", "pixels")
    train(
        [*edm, "--formulation", "edm", "--max_train_steps", "1", "--checkpointing_steps", "1"],
        script=UNCONDITIONAL_SCRIPT,
    )
    return made


def command_line(
    materials: Materials, output: Path, name: str, more: tuple[object, ...], space: str = "pixels"
) -> list[str]:
    """The arguments, with the places put in."""
    filled = [str(part).replace("{}", str(materials.folder)) for part in more]
    network = "dit" if name == "class" else "unet"
    argv = materials.argv(output, SCRIPTS[name], network, space, "--max_train_steps", 2, *filled)
    if PIPELINE in filled:
        place = argv.index(CONFIG[name])
        del argv[place : place + 2]
    return argv


@pytest.fixture
def _no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and autoencoders are out of bounds, and there is no GPU."""

    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    for name in ("load_space", "make_network"):
        monkeypatch.setattr(image_components, name, loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    installed = environment_checks.installed
    monkeypatch.setattr(
        environment_checks, "installed", lambda name: name == "xformers" or installed(name)
    )


# script ("" for both), arguments, what the message must hold: the value and what to do
BEFORE_MODELS: dict[str, tuple[str, tuple[object, ...], tuple[str, ...]]] = {
    "no formulation": ("", ("--formulation", "vp"), ("'vp'", "ddpm", "flow", "edm")),
    "no prediction": ("", ("--prediction_type", "score"), ("'score'", "epsilon")),
    "v of a flow": (
        "",
        ("--formulation", "flow", "--prediction_type", "sample"),
        ("--prediction_type is sample", "--formulation ddpm"),
    ),
    "no scheduler": (
        "",
        ("--sampling_scheduler", "DDIMSheduler"),
        ("'DDIMSheduler'", "DDIMScheduler"),
    ),
    "scheduler of another family": (
        "",
        ("--formulation", "edm", "--sampling_scheduler", "DDIMScheduler"),
        ("--sampling_scheduler DDIMScheduler", "--formulation edm"),
    ),
    "xformers without CUDA": (
        "",
        ("--enable_xformers_memory_efficient_attention",),
        ("CUDA device", "drop the flag"),
    ),
    "no such autoencoder": ("", (VAE, "/nowhere/vae"), (f"{VAE} is /nowhere/vae", "Give a folder")),
    "no such pipeline": ("", (PIPELINE, "/nowhere/p"), ("'/nowhere/p' cannot be read", "Give a")),
    "not a pipeline": (
        "",
        (PIPELINE, "{}/empty", "--formulation", "ddpm"),
        ("empty' cannot be read", "Give a"),
    ),
    "no such folder": ("", ("--train_data_dir", "/nowhere/d"), ("/nowhere/d", "Give a folder")),
    "no images": ("", ("--train_data_dir", "{}/VQModel"), ("VQModel' has no images",)),
    "no image column": ("", ("--image_column", "picture"), ("'picture'", "image")),
    "curriculum too long": (
        "",
        ("--curriculum", "difficulty"),
        ("--curriculum_max_share", "2 steps"),
    ),
    "no such checkpoint": (
        "",
        ("--resume_from_checkpoint", "checkpoint-7"),
        ("checkpoint-7", "Give latest"),
    ),
    "output is a file": ("", ("--output_dir", "{}/dit.json"), ("is a file", "Name a folder")),
    "a mistyped flag": ("", ("--formulaton", "flow"), ("--formulaton", "--formulation")),
    "no config": ("", ("CONFIG", "/nowhere/c.json"), ("is /nowhere/c.json", "config.json")),
    "no classes": (
        "class",
        ("--train_data_dir", "{}/bare"),
        ("'label'", "found: image.", "folder per class"),
    ),
    "no such label column": (
        "class",
        ("--label_column", "kind"),
        ("--label_column 'kind'", "image, text, label"),
    ),
    "captions are no classes of images": (
        "class",
        ("--image_column", "text"),
        ("--image_column 'text'", "not images"),
    ),
    "a missing class": (
        "class",
        ("--train_data_dir", "{}/unlabelled"),
        ("02.png", "class is missing", "skip"),
    ),
    "dropout above one": ("class", ("--label_dropout", 2), ("--label_dropout is 2", "[0, 1]")),
    "classes": ("class", ("--train_data_dir", "{}/images", "--label_dropout", "much"), ("'much'",)),
    "crops without a cache": (
        "unconditional",
        ("--latent_crops", 3),
        ("--latent_crops is 3", "--cache_latents"),
    ),
    "EMA settings alone": (
        "unconditional",
        ("--ema_power", 0.5),
        ("--ema_power is 0.5", "--use_ema"),
    ),
}


def told(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.split("error: ")[-1]


def cases(table: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(script, name, id=f"{script}-{name}")
        for name, (only, *_) in table.items()
        for script in SCRIPTS
        if only in ("", script)
    ]


@pytest.mark.reliability
@pytest.mark.usefixtures("_no_models")
@pytest.mark.parametrize(("script", "name"), cases(BEFORE_MODELS))
def test_it_is_refused_before_a_model_is_loaded(
    materials: Materials, tmp_path: Path, script: str, name: str, capsys: Any
) -> None:
    _, more, expected = BEFORE_MODELS[name]
    more = tuple(CONFIG[script] if part == "CONFIG" else part for part in more)
    argv = command_line(materials, tmp_path / "out", script, more)
    assert status(argv, SCRIPTS[script]) == 2
    message = told(capsys)
    assert [part for part in expected if part not in message] == []


@pytest.mark.usefixtures("_no_models")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_right_line_gets_as_far_as_the_models(
    materials: Materials, tmp_path: Path, script: str
) -> None:
    with pytest.raises(AssertionError, match="a model was loaded"):
        status(command_line(materials, tmp_path, script, ()), SCRIPTS[script])


WITH_MODELS: dict[str, tuple[str, tuple[object, ...], tuple[str, ...]]] = {
    "patch": (
        "class",
        ("--model_config", "{}/odd.json"),
        ("patch_size=3 does not divide the 8 x 8",),
    ),
    "channels": ("", ("CONFIG", "{}/two.json"), ("two.json' takes 2 channels", "change its")),
    "alpha": (
        "",
        ("CONFIG", "{}/alpha.json", "--background", "white"),
        ("--background is white", "drop it"),
    ),
    "rows": ("class", ("--model_config", "{}/few.json"), ("num_class_embeds=3", "need 4")),
    "resolution": (
        "",
        (VAE, "{}/AutoencoderKL", "--resolution", 9),
        ("resolution=9", "multiple of 2"),
    ),
    "no autoencoder": ("", (VAE, "{}/images"), (VAE, "images", "Give a folder")),
    "a network": (
        "",
        (VAE, "{}/class_run/transformer"),
        ("DiTTransformer2DModel", "no known autoencoder"),
    ),
    "no network": ("", ("CONFIG", "{}/VQModel"), ("of class VQModel", "UNet2DModel")),
    "other classes": (
        "class",
        (PIPELINE, "{}/few_run", "--train_data_dir", "{}/more"),
        ("knows 3 classes, and the data has 4",),
    ),
    "other latents": (
        "class",
        (PIPELINE, "{}/class_run", "--resolution", 16),
        ("side 4", "gives 4 of side 8"),
    ),
    "latents of another": (
        "",
        (VAE, "{}/VQModel", "--cache_latents", "--latent_cache_dir", "{}/class_run/latents"),
        ("class_run/latents", "autoencoder"),
    ),
}


@pytest.fixture(scope="module")
def few(materials: Materials) -> None:
    """A pipeline of a network that knows three classes."""
    argv = materials.argv(materials.folder / "few_run", CLASS_SCRIPT, "unet", "pixels")
    train([*argv, "--max_train_steps", "1"], script=CLASS_SCRIPT)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("script", "name"), cases(WITH_MODELS))
def test_what_does_not_fit_is_refused_before_a_step(
    materials: Materials, tmp_path: Path, script: str, name: str, capsys: Any, monkeypatch: Any
) -> None:
    def trained(*args: Any) -> Any:
        raise AssertionError("a step was made")

    monkeypatch.setattr(job, "make_update", trained)
    _, more, expected = WITH_MODELS[name]
    more = tuple(CONFIG[script] if part == "CONFIG" else part for part in more)
    argv = command_line(materials, tmp_path / "out", script, more)
    assert status(argv, SCRIPTS[script]) == 2
    message = told(capsys)
    assert [part for part in expected if part not in message] == []


# what is resumed, what differs, what the message names
RESUMED: dict[str, tuple[str, tuple[object, ...], tuple[str, ...]]] = {
    "prediction": ("class", ("--prediction_type", "v_prediction"), ("prediction_type",)),
    "formulation": ("class", ("--formulation", "flow"), ("schedule", "prediction_type", "sampler")),
    "labels": ("class", ("--train_data_dir", "{}/relabelled"), ("dataset: digest of captions",)),
    "classes": ("class", ("--train_data_dir", "{}/more"), ("model.classes is 4, was 3",)),
    "column": ("class", ("--label_column", "text"), ("dataset.columns", "text", "label")),
    "dropout": ("class", ("--label_dropout", 0.3), ("images.label_dropout is 0.3, was 0.1",)),
    "latents": ("class", (VAE, "{}/VQModel"), ("model.autoencoder",)),
    "network": ("class", ("--model_config", "DiT-S/2"), ("model.config is DiT-S/2",)),
    "steps": ("unconditional", ("--ddpm_num_steps", 500), ("schedule.levels is 500, was 1000",)),
    "a flow": ("unconditional", ("--formulation", "flow"), ("schedule.family is flow, was vp",)),
    "sigma_data": (
        "edm",
        ("--formulation", "edm", "--sigma_data", 1.0),
        ("sigma_data is 1.0, was 0.5",),
    ),
    "table": (
        "edm",
        ("--formulation", "edm", "--discrete_timesteps"),
        ("sampler.continuous is unset, was True",),
    ),
}


def resuming(materials: Materials, run: str, more: tuple[object, ...]) -> tuple[list[str], str]:
    script = "class" if run == "class" else "unconditional"
    space = "AutoencoderKL" if run == "class" else "pixels"
    cached = ("--cache_latents",) if run == "class" else ()
    output = materials.folder / f"{run}_run"
    return command_line(materials, output, script, (*RESUME, *cached, *more), space), script


@pytest.mark.reliability
@pytest.mark.usefixtures("_no_models")
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_not_resumed_as_another(materials: Materials, name: str, capsys: Any) -> None:
    run, more, expected = RESUMED[name]
    argv, script = resuming(materials, run, more)
    assert status(argv, SCRIPTS[script]) == 2
    message = told(capsys)
    assert [part for part in (*expected, "--allow_config_change") if part not in message] == []


@pytest.mark.usefixtures("_no_models")
@pytest.mark.parametrize(("run", "more"), [("class", ()), ("edm", ("--formulation", "edm"))])
def test_the_same_run_is_resumed(materials: Materials, run: str, more: tuple[str, ...]) -> None:
    argv, script = resuming(materials, run, more)
    with pytest.raises(AssertionError, match="a model was loaded"):
        status(argv, SCRIPTS[script])


def test_a_pipeline_keeps_the_names_of_all_classes(materials: Materials, tmp_path: Path) -> None:
    images = materials.folder / "images"
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    words = shutil.copytree(images, tmp_path / "words")
    (words / "metadata.jsonl").write_text(
        "\n".join(json.dumps(row | {"label": ["bee", "cow", "ant"][row["label"]]}) for row in rows)
    )
    more = ("--train_data_dir", words, "--max_train_samples", 1)
    train(command_line(materials, tmp_path / "out", "class", more), script=CLASS_SCRIPT)
    names = dict(load_pipeline(tmp_path / "out").config.id2label)
    assert {int(k): v for k, v in names.items()} == {0: "ant", 1: "bee", 2: "cow"}


@pytest.mark.parametrize(
    ("script", "more", "expected"),
    [
        ("class", ("--formulation", "flow", "--flow_shift", 0), "--flow_shift is 0.0"),
        ("class", ("--train_data_dir", "{}/bare"), "folder per class"),
        ("unconditional", ("--sampling_scheduler", "EDMEulerScheduler"), "EDMEulerScheduler"),
    ],
)
def test_the_process_ends_with_status_2_and_one_line(
    materials: Materials, tmp_path: Path, script: str, more: tuple[object, ...], expected: str
) -> None:
    path = ROOT.joinpath(*SCRIPTS[script].split(".")).with_suffix(".py")
    done = subprocess.run(
        [sys.executable, str(path), *command_line(materials, tmp_path / "out", script, more)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert expected in line
    assert not list(tmp_path.rglob("*.safetensors"))


# -- --show_timesteps ------------------------------------------------------------------------------


@pytest.fixture
def _nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, models and accelerator are out of bounds."""

    def forbidden(what: str) -> Callable[..., Any]:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"{what} was touched")

        return fail

    monkeypatch.setattr(sources, "load_images", forbidden("the data set"))
    monkeypatch.setattr(image_task.ImageTask, "load", forbidden("a model"))
    monkeypatch.setattr(image_components, "load_space", forbidden("the autoencoder"))
    monkeypatch.setattr(image_components, "make_network", forbidden("the network"))
    monkeypatch.setattr(runtime, "make_accelerator", forbidden("the accelerator"))


SHOWN = {
    "ddpm": (),
    "v": ("--prediction_type", "v_prediction", "--loss_weighting", "min_snr"),
    "flow": ("--formulation", "flow", "--flow_shift", "3"),
    "edm": ("--formulation", "edm"),
    "edm on its table": ("--formulation", "edm", "--discrete_timesteps"),
    "curriculum": ("--formulation", "flow", "--curriculum", "difficulty"),
    "latents": ("--formulation", "edm", VAE, "owner/autoencoder"),
}


@pytest.mark.usefixtures("_nothing_else")
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_trained_on_is_shown_without_data_or_models(
    tmp_path: Path, script: str, capsys: Any
) -> None:
    base, shown = (CONFIG[script], "DiT-B/2"), {}
    for name, more in SHOWN.items():
        file = tmp_path / f"{name}.json"
        assert status([*base, "--show_timesteps", str(file), *more], SCRIPTS[script]) == 0
        shown[name] = json.loads(file.read_text())
    assert len({json.dumps(document) for document in shown.values()}) >= 6
    assert status([*base, "--show_timesteps", "terminal"], SCRIPTS[script]) == 0
    assert "density over log-SNR" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


@pytest.mark.usefixtures("_nothing_else")
@pytest.mark.parametrize("script", SCRIPTS)
def test_too_long_a_curriculum_is_shown_with_a_warning(
    tmp_path: Path, script: str, capsys: Any
) -> None:
    more = ("--curriculum", "difficulty", "--max_train_steps", "100")
    argv = [CONFIG[script], "UNet", "--show_timesteps", str(tmp_path / "a.json"), *more]
    assert status(argv, SCRIPTS[script]) == 0
    assert "training would be refused" in capsys.readouterr().out
    warnings = json.loads((tmp_path / "a.json").read_text())["warnings"]
    assert "--curriculum_max_share 0.3" in warnings[0]
