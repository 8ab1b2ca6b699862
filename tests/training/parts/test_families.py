"""Every family of text-to-image models says what it is, in one file that is found by itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from diffusers_curriculum.cli import main
from diffusers_curriculum.training.parts.families import base
from diffusers_curriculum.training.parts.families.base import FAMILIES, ModelFamily, families
from tests.training.parts.families.flow_benches import PRESENT

FOLDER = Path(inspect.getfile(base)).parent
NAMES = sorted(PRESENT)


def test_all_files_of_the_folder_are_found() -> None:
    written = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "base", "flow"}
    found = {type(family).__module__.rpartition(".")[2] for family in families().values()}
    assert written == found


def test_a_new_file_is_found_without_an_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from diffusers_curriculum.training.parts.families.base import FAMILIES, ModelFamily\n"
        "@FAMILIES.register('mine')\n"
        "class Mine(ModelFamily):\n"
        "    title = 'a pipeline of mine'\n"
    )
    (tmp_path / "mine_of_a_test.py").write_text(code)
    package = inspect.getmodule(base).__package__  # pyright: ignore[reportOptionalMemberAccess]
    monkeypatch.setattr(base, "__file__", str(tmp_path / "base.py"))
    monkeypatch.setattr(f"{package}.__path__", [str(FOLDER), str(tmp_path)])
    families.cache_clear()
    try:
        assert families()["mine"].title == "a pipeline of mine"
    finally:
        FAMILIES.remove("mine")
        families.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_family_names_is_there(name: str) -> None:
    family = families()[name]
    parameters = inspect.signature(family.pipeline_class.__init__).parameters
    for part, classes in family.parts.items():
        assert part in parameters
        for each in classes:
            assert getattr(diffusers, each, None) or getattr(transformers, each)
    assert {*family.optional, *family.settings, *family.absent} <= {*parameters}
    assert family.network in family.parts
    assert "vae" in family.parts
    pairs = [tokenizer.replace("tokenizer", "text_encoder") for tokenizer in family.tokenizers]
    assert pairs == [*family.encoders]


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_one_is_loaded_and_draws_in_plain_diffusers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    for folder in ("one", "two"):
        words = ["make-tiny", "--type", name, "--output_dir", str(tmp_path / folder)]
        assert main([*words, "--seed", "3"]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert str(tmp_path / "one") in capsys.readouterr().out
    files = [path for path in (tmp_path / "one").rglob("*") if path.suffix == ".safetensors"]
    assert len(files) == len(families()[name].weighted)
    for path in files:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "one")
    assert type(pipeline) is families()[name].pipeline_class
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_inference_steps": 1}
    image = pipeline(prompt="a bird", output_type="pt", **size).images[0]
    assert bool(image.isfinite().all())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("sdlx",), "family of models 'sdlx' is unknown.*is 'sdxl' meant"),
        (("sdxl", "--resolution", "32"), "--resolution 32 has no effect with --type sdxl: drop it"),
        (("sdxl", "--vae_steps", "0"), "--vae_steps 0 has no effect"),
    ],
)
def test_what_no_tiny_one_can_be_made_of(
    tmp_path: Path, words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["make-tiny", "--output_dir", str(tmp_path / "x"), "--type", *words]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_must_be_written_is_missing(name: str) -> None:
    own = type(families()[name])
    for method in ("misfits", "encode_text", "predict"):
        assert getattr(own, method) is not getattr(ModelFamily, method)
    assert own.title.startswith(("a ", "an "))
