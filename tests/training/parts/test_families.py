"""Every family of text-to-image models says what it is, in one file that is found by itself."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import pytest
import transformers

from diffusers_curriculum.training.parts.families import base
from diffusers_curriculum.training.parts.families.base import FAMILIES, ModelFamily, families

FOLDER = Path(inspect.getfile(base)).parent
NAMES = sorted(families())


def test_all_files_of_the_folder_are_found() -> None:
    written = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "base"}
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
def test_nothing_that_must_be_written_is_missing(name: str) -> None:
    own = type(families()[name])
    for method in ("misfits", "encode_text", "predict"):
        assert getattr(own, method) is not getattr(ModelFamily, method)
    assert own.title.startswith(("a ", "an "))
