"""What a user gets from `pip install`, and that the pins of the tools agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

import diffusers_curriculum
from diffusers_curriculum.cli.train import SCRIPTS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_the_scripts_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.startswith(f"diffusers_curriculum-{diffusers_curriculum.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "diffusers_curriculum").rglob("*.py")}
    assert sources | {"diffusers_curriculum/py.typed"} <= names
    demo = ("demo", "shell", "digits", "recognise", "learning_curve")
    assert {f"diffusers_curriculum/examples/{name}.py" for name in demo} <= names
    scripts = {f"{module}.py" for module in SCRIPTS.values()}
    parts = {path.name for path in (ROOT / "examples" / "autoencoder").glob("*.py")}
    top = {name.split("/")[0].split("-")[0] for name in names}
    assert top == {"diffusers_curriculum"} | scripts | parts


def run_installed(wheel: Path, folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program where the wheel is unpacked and the checkout is not found."""
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {program}"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_installed_script_runs_as_a_module_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    module = SCRIPTS["text-to-image"]
    program = f"import runpy; sys.argv = ['x', '--help']; runpy.run_module({module!r}, "
    done = run_installed(wheel, tmp_path, f"{program}run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert "--timestep_sampler" in done.stdout


@pytest.mark.parametrize("kind", ["lora", "autoencoder"])
def test_installed_scripts_run_by_short_names(wheel: Path, tmp_path: Path, kind: str) -> None:
    program = f"from diffusers_curriculum.cli import main; main(['train', {kind!r}, '--help'"
    done = run_installed(wheel, tmp_path, f"{program}])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {SCRIPTS[kind]}.py")
    asked = f"from diffusers_curriculum.cli.train import script_file; print(script_file({kind!r}))"
    found = run_installed(wheel, tmp_path, asked).stdout.strip()
    assert Path(found) == tmp_path / "site" / f"{SCRIPTS[kind]}.py"


def run_program(wheel: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run an installed program, all of whose processes find the wheel and not the checkout."""
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": tools}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCRIPTS)
def test_accelerate_launches_every_installed_script(wheel: Path, tmp_path: Path, kind: str) -> None:
    launch = ("accelerate", "launch", "--cpu", "--num_processes", "1", "-m")
    done = run_program(wheel, tmp_path, *launch, SCRIPTS[kind], "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {SCRIPTS[kind]}.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_from_an_installation(wheel: Path, tmp_path: Path) -> None:
    words = ("--max_train_steps", "280", "--vae_steps", "20", "--output_dir", "out")
    done = run_program(wheel, tmp_path, "diffusers-curriculum", "demo", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "$ python site/diffusers_curriculum/examples/digits.py" in done.stdout
    assert (tmp_path / "out" / "pictures" / "learning_curve.png").is_file()


def test_console_command_exists(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "diffusers-curriculum = diffusers_curriculum.cli:main" in archive.read(entry).decode()
    from diffusers_curriculum.cli import main

    assert callable(main)


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def _bounds(kind: str, *extras: str) -> dict[str, str]:
    """Package and version of each requirement that has a bound of one kind, `>=` or `==`."""
    project = PROJECT["project"]
    wanted = [*project["dependencies"]]
    wanted += [entry for extra in extras for entry in project["optional-dependencies"][extra]]
    return dict(re.sub(r"\[.*?\]", "", entry).split(kind) for entry in wanted if kind in entry)


def test_pins_agree() -> None:
    exact = _bounds("==", "train", "dev")
    assert set(exact) == {"ruff", "pyright"}
    assert exact.items() <= _pins("constraints.txt").items()


def test_the_lowest_versions_are_the_floors() -> None:
    floors, lowest = _bounds(">=", "train", "lora", "dev"), _pins("constraints-lowest.txt")
    beside = {"pyparsing", "pandas"}  # of matplotlib and datasets
    assert lowest.keys() - floors.keys() == beside
    assert all(Version(lowest[name]) == Version(floors[name]) for name in floors)


def test_the_pins_are_allowed() -> None:
    floors, pins = _bounds(">=", "train", "lora", "dev"), _pins("constraints.txt")
    assert all(Version(pins[name]) >= Version(floors[name]) for name in floors.keys() & pins.keys())
