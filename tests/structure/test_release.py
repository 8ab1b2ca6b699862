"""What must hold of a release: files that anyone can build again, and one version everywhere."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import venv
from datetime import date
from pathlib import Path

import pytest

import diffusers_curriculum

ROOT = Path(__file__).parents[2]
VERSION = diffusers_curriculum.__version__


def built(source: Path, folder: Path, *targets: str) -> dict[str, str]:
    """SHA-256 of each file that hatchling builds."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    command += [word for target in targets for word in ("-t", target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_wheel_and_sdist_are_built_again_to_the_same_bytes(tmp_path: Path) -> None:
    first = built(ROOT, tmp_path / "first", "wheel", "sdist")
    assert len(first) == 2
    assert built(ROOT, tmp_path / "second", "wheel", "sdist") == first
    (sdist,) = (tmp_path / "first").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    from_sdist = built(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "third", "wheel")
    assert from_sdist.items() <= first.items()


def test_the_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [VERSION]


@pytest.mark.slow
def test_the_changelog_ends_with_the_version_and_a_day() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    version, day = re.findall(r"^## \[(.+?)\](?: - (.+))?$", text, re.MULTILINE)[0]
    assert version == VERSION
    assert date.fromisoformat(day)


@pytest.mark.slow
def test_the_wheel_by_itself_tells_its_version(tmp_path: Path) -> None:
    built(ROOT, tmp_path / "dist", "wheel")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    install = [binaries / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, timeout=120)
    asked = [binaries / "diffusers-curriculum", "--version"]
    told = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.split()[-1] == VERSION
