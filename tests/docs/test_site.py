"""The documents as a site: no page is missing, no link leads nowhere, every public name is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from docs.site import PUBLIC, api, public_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    more = {"NO_MKDOCS_2_WARNING": "1"}
    environment: Mapping[str, str] = os.environ | more
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]  # a warning is an error
    return folder


def test_every_public_name_has_its_docstring_there(site: Path) -> None:
    page = (site / "api" / "index.html").read_text("utf-8")
    for module in PUBLIC:
        for name in public_names(module):
            head = page.partition(f'id="{module}.{name}"')[2]
            body = re.split(r'id="diffusers_curriculum\.', head)[0]
            assert head, f"{module}.{name} is not there"
            assert re.search(r"<p>", body), f"{module}.{name} has no docstring"


def test_every_document_is_in_the_menu(site: Path) -> None:
    menu = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*/*.md")]
    names = [str(page.relative_to(ROOT)) for page in pages]
    assert len(names) > 20
    assert not [name for name in names if f": {name}\n" not in menu]
    assert (site / "docs" / "choosing" / "index.html").is_file()


def test_names_of_the_page_are_those_that_python_finds() -> None:
    import importlib

    found = {f"{module}.{name}" for module in PUBLIC for name in public_names(module)}
    assert all(hasattr(importlib.import_module(m), n) for m, n in (f.rsplit(".", 1) for f in found))
    assert set(re.findall(r"^::: (.+)$", api(), re.MULTILINE)) == found
