"""Pipelines of this package, loaded and drawn from where the package cannot be imported."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_curriculum.models.image_tokens import ImageTokenTransformer
from diffusers_curriculum.models.two_times import TwoTimesUNet2DModel, with_two_times
from diffusers_curriculum.models.vit_vq import ViTVQModel
from diffusers_curriculum.pipelines import (
    ClassConditionalPipeline,
    ImageTokenPipeline,
    UnconditionalPipeline,
)
from diffusers_curriculum.pipelines.self_contained import one_module
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process.foreign_code import refuse_foreign_code
from diffusers_curriculum.training.publish.hub import files_to_upload
from tests.pipelines.parts_fixtures import (
    SCHEDULERS,
    generator,
    tiny_dit,
    tiny_token_transformer,
    tiny_unet,
    tiny_vit,
)

NAMES = {0: "seven", 1: "two", 2: "one"}
# Without the package, draw what the folders on the command line hold.
ELSEWHERE = """
import sys
sys.modules["diffusers_curriculum"] = None  # importing it fails
import numpy, torch
from diffusers import DiffusionPipeline
for folder, count in zip(sys.argv[1::2], sys.argv[2::2]):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    given = {"class_labels": ["two", 0]} if hasattr(pipeline, "labels") else {"batch_size": 2}
    given |= {"num_inference_steps": 2} if hasattr(pipeline, "scheduler") else {"top_k": 5}
    generator = torch.Generator().manual_seed(0)
    images = pipeline(**given, generator=generator, output_type="np").images
    numpy.save(f"{folder}/images.npy", images)
try:
    import diffusers_curriculum
except ImportError:
    print("without the package")
"""


def conditional() -> Any:
    """A class-conditional flow in the latents of a ViT-VQGAN."""
    network = tiny_dit(classes=3, channels=8, size=4)
    parts: dict[str, Any] = {"transformer": network, "vae": tiny_vit()}
    return ClassConditionalPipeline(SCHEDULERS["flow"](), id2label=NAMES, **parts)


def unconditional() -> Any:
    """EDM in pixels."""
    return UnconditionalPipeline(SCHEDULERS["edm"](), unet=tiny_unet())


def few_steps() -> Any:
    """Average velocities between two times, in pixels, that tell the length of a step."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        network = with_two_times(tiny_unet())
        for name, weight in network.named_parameters():
            if ".length." in name:
                torch.nn.init.normal_(weight, std=0.3)
    return UnconditionalPipeline(SCHEDULERS["flow"](), unet=network)


def tokens() -> Any:
    """Code by code."""
    return ImageTokenPipeline(tiny_token_transformer(), tiny_vit(), id2label=NAMES)


OWN = (
    (ClassConditionalPipeline, conditional),
    (UnconditionalPipeline, unconditional),
    (UnconditionalPipeline, few_steps),
    (ImageTokenPipeline, tokens),
)


def drawn(pipeline: Any, **given: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    given |= {"num_inference_steps": 2} if hasattr(pipeline, "scheduler") else {"top_k": 5}
    return pipeline(**given, generator=generator(), output_type="np").images


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipelines, and what they draw in a process without the package."""
    root = tmp_path_factory.mktemp("saved")
    builds = (conditional, unconditional, few_steps, tokens)
    for build in builds:
        build().save_pretrained(root / build.__name__)
    names = [build.__name__ for build in builds]
    told = [text for name in names for text in (str(root / name), "2")]
    hidden = ("PYTHONPATH",)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *told],
        cwd=root,
        env={k: v for k, v in os.environ.items() if k not in hidden} | {"HF_HOME": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "without the package" in done.stdout, done.stderr
    return root


def test_the_images_are_the_same_without_the_package(saved: Path) -> None:
    two, named = {"batch_size": 2}, {"class_labels": ["two", 0]}
    cases = ((conditional, named), (unconditional, two), (few_steps, two), (tokens, named))
    for build, given in cases:
        there = np.load(saved / build.__name__ / "images.npy")
        assert np.array_equal(there, drawn(build(), **given))


def test_a_new_process_loads_them_by_their_classes(saved: Path) -> None:
    loads = (
        f"getattr(pipelines, {kind.__name__!r}).from_pretrained({str(saved / build.__name__)!r})"
        for kind, build in OWN
    )
    code = "\n".join(["from diffusers_curriculum import pipelines", *loads])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_with_the_package_nothing_of_the_folder_runs(saved: Path, tmp_path: Path) -> None:
    for kind, build in OWN:
        folder = tmp_path / build.__name__
        build().save_pretrained(folder)
        for module in folder.rglob("*.py"):
            module.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        loaded: Any = kind.from_pretrained(folder)
        assert type(loaded) is kind
        again = tmp_path / f"{build.__name__}-again"
        loaded.save_pretrained(again)
        assert type(kind.from_pretrained(again)) is kind
        refuse_foreign_code(str(folder))  # a run may go on from it
    assert type(ClassConditionalPipeline.from_pretrained(saved / "conditional").vae) is ViTVQModel
    assert not (tmp_path / "ran").exists()


def test_the_modules_are_uploaded_and_no_others(saved: Path, tmp_path: Path) -> None:
    sent = files_to_upload(saved / "conditional")
    assert [name for name in sent if name.endswith(".py")] == ["pipeline.py", "vae/vit_vq.py"]
    assert "unet/two_times.py" in files_to_upload(saved / "few_steps")
    assert "transformer/image_tokens.py" in files_to_upload(saved / "tokens")
    for name in ("pipeline.py", "unet/vit_vq.py", "unet/config.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert files_to_upload(tmp_path) == ["model_index.json", "unet/config.json"]


def test_only_our_own_module_is_let_in(tmp_path: Path) -> None:
    for name in (["pipeline", "Evil"], ["evil", "UnconditionalPipeline"], ["pipeline"]):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(UsageError, match="the pipeline is a module"):
            refuse_foreign_code(str(tmp_path))


KINDS = (ClassConditionalPipeline, UnconditionalPipeline, ImageTokenPipeline)
KINDS += (ViTVQModel, TwoTimesUNet2DModel, ImageTokenTransformer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_imports_nothing_of_the_package(kind: type) -> None:
    tree = ast.parse(one_module(kind))
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    sources = {getattr(n, "module", None) or n.names[0].name for n in imported}
    assert not [name for name in sources if name.startswith("diffusers_curriculum")]
    defined = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert defined[-1] == kind.__name__
    assert len(defined) == len(set(defined))
    assert torch.__name__ in sources or kind is ViTVQModel
