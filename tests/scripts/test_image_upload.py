"""What the image scripts upload: which files, and a card whose text is text and whose code runs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from tests.scripts.image_runs import (
    CLASS_SCRIPT,
    RESOLUTION,
    UNCONDITIONAL_SCRIPT,
    Materials,
    make_materials,
    write_class_folders,
)
from tests.training.fake_hub import FakeHub, serve

WEIGHTS = "diffusion_pytorch_model.safetensors"
GRID = "val_imgs_grid.png"
TOKEN = "hf_ThisIsTheSecretOfTheTest"
NASTY = ["# big", "* a *b* _c_", "<b>bold", "[x](evil)", "`code`", "a|b", "---", "{repo_id}"]
FACTS = ("Network", "Trained on", "Autoencoder", "Formulation")
UPLOADER = """
import json, sys
from tests.scripts.small_runs import train
for script, argv in json.loads(sys.argv[1]):
    train(argv, script=script)
"""
PIPELINES = {CLASS_SCRIPT: "DiTPipeline", UNCONDITIONAL_SCRIPT: "UnconditionalPipeline"}
RUNNER = """
import os, runpy, sys
sys.modules["diffusers_curriculum"] = None  # importing it fails
for code in sys.argv[1:]:
    os.chdir(os.path.dirname(code))
    runpy.run_path(code)
"""


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    folder = tmp_path_factory.mktemp("materials")
    write_class_folders(folder / "nasty", NASTY)
    return make_materials(folder)


def run_python(program: str, *argv: str, **environment: str) -> None:
    root = str(Path(__file__).parents[2])
    settings = {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": root, **environment}
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=root,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def uploaded(
    materials: Materials, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, FakeHub]]:
    """Both scripts' runs, with all that a run can leave, pushed to a Hub on the loopback."""
    folder = tmp_path_factory.mktemp("uploads")
    runs = []
    for script, name in PIPELINES.items():
        words: list[object] = [
            *("--max_train_steps", 4, "--checkpointing_steps", 2, "--cache_latents"),
            *("--power_ema", 0.1, "--push_to_hub", "--hub_token", TOKEN),
        ]
        if script == CLASS_SCRIPT:
            words += ["--train_data_dir", materials.folder / "nasty"]
            words += ["--validation_inference_steps", 3, "--validation_images_per_class", 1]
        else:
            words += ["--ddpm_num_inference_steps", 3, "--eval_batch_size", 2, "--hub_private_repo"]
            words += ["--timestep_plot_steps", 2]
        argv = materials.argv(folder / name, script, "dit", "AutoencoderKL", *words)
        argv.remove("--no_pictures")
        runs.append((script, argv))
    with serve() as hub:
        home = str(folder / "home")
        run_python(
            UPLOADER, json.dumps(runs), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=home
        )
        yield folder, hub


def created(hub: FakeHub) -> list[dict[str, Any]]:
    return [json.loads(r.body) for r in hub.requests if r.path == "/api/repos/create"]


def test_the_repositories_are_made_before_training_and_private_where_asked(
    uploaded: tuple[Path, FakeHub],
) -> None:
    asked = created(uploaded[1])
    assert [request["name"] for request in asked] == list(PIPELINES.values())
    hidden = [request.get("private") or request.get("visibility") == "private" for request in asked]
    assert [bool(one) for one in hidden] == [False, True]


def test_exactly_the_pipeline_is_uploaded(uploaded: tuple[Path, FakeHub]) -> None:
    folder, hub = uploaded
    common = {
        "README.md",
        "model_index.json",
        "timestep_sampler/timestep_sampler_config.json",
        GRID,
    }
    common |= {"scheduler/scheduler_config.json"}
    parts = {
        f"{part}/{file}" for part in ("transformer", "vae") for file in ("config.json", WEIGHTS)
    }
    assert len(hub.commits) == 2
    for name, commit in zip(PIPELINES.values(), hub.commits, strict=True):
        left = {path.name for path in (folder / name).iterdir()}
        assert {"run.json", "checkpoint-2", "latents", "power_ema", "logs"} <= left
        own = {"pipeline.py"} if name == "UnconditionalPipeline" else set()
        sent = {n for n in commit["files"] if not n.endswith(".png") or n == GRID}
        assert sent == common | parts | own
        assert all(
            content == (folder / name / n).read_bytes() for n, content in commit["files"].items()
        )
        assert not any(TOKEN.encode() in content for content in commit["files"].values())


def code_of(card: str) -> str:
    return next(t.content for t in MarkdownIt("gfm-like").parse(card) if t.type == "fence")


def test_the_code_of_the_cards_names_the_pipeline_and_runs(uploaded: tuple[Path, FakeHub]) -> None:
    folder, hub = uploaded
    programs = []
    for commit in hub.commits:
        index = json.loads(commit["files"]["model_index.json"])
        code = code_of(commit["files"]["README.md"].decode())
        imported, made, *_ = ast.parse(code).body
        assert isinstance(imported, ast.ImportFrom)
        assert isinstance(made, ast.Assign)
        (alias,) = imported.names
        name, own = index["_class_name"], isinstance(index["_class_name"], list)
        name = name[1] if own else name
        assert alias.name == ("DiffusionPipeline" if own else name)
        assert isinstance(made.value, ast.Call)
        (where,) = made.value.args
        repository = ast.literal_eval(where)
        assert repository == f"somebody/{name}"
        # A copy of what arrived, at the path that is the repository's name
        here = folder / "downloads" / name
        for file, content in commit["files"].items():
            path = here / repository / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (here / "use.py").write_text(code, "utf-8")
        programs.append(str(here / "use.py"))
    run_python(RUNNER, *programs)
    for program in programs:
        with Image.open(Path(program).parent / "image.png") as image:
            assert image.size == (RESOLUTION, RESOLUTION)


def test_class_names_stay_text_in_the_card(uploaded: tuple[Path, FakeHub]) -> None:
    card = uploaded[1].commits[0]["files"]["README.md"].decode()
    _, front, body = card.split("---\n", 2)
    assert "class-conditional" in front
    tokens = MarkdownIt("gfm-like", {"html": True}).parse(body)
    inline = [token for token in tokens if token.type == "inline"]
    kinds = {child.type for token in inline for child in token.children or []}
    assert kinds <= {"text", "text_special", "image"}
    assert not {"html_block", "table_open", "hr"} & {token.type for token in tokens}
    shown = ["".join(c.content for c in token.children or []) for token in inline]
    assert [text for text in shown if text in NASTY] == sorted(NASTY)
    assert [t.content for t in inline if t.content.startswith("Classes")] == [
        "Classes, one row each:"
    ]
    assert "Trained from scratch" in body
    assert "base_model" not in front
    facts = [text for text in shown if text.partition(":")[0] in FACTS]
    assert facts == [
        "Network: DiTTransformer2DModel",
        "Trained on: latents",
        "Autoencoder: AutoencoderKL",
        "Formulation: ddpm",
    ]
    index = json.loads(uploaded[1].commits[0]["files"]["model_index.json"])
    assert list(index["id2label"].values()) == sorted(NASTY)
