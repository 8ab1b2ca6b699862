"""--import: laws of one's own on every command line, recorded, and asked for again on a resume."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_curriculum import DensityTimestepSampler, TimestepSampler
from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.cli import main
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.samplers import SAMPLERS
from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.imports import import_modules
from diffusers_curriculum.training.checkpoint.verify import inspect_run
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.job import Job
from diffusers_curriculum.training.storage.manifest import versions
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from diffusers_curriculum.weighting import WEIGHTINGS
from tests.scripts.small_runs import reset_accelerate

ROOT = Path(__file__).parents[3]
LAWS = '''
from dataclasses import dataclass

import torch

from diffusers_curriculum import weighting
from diffusers_curriculum.densities import DENSITIES, laws
from diffusers_curriculum.samplers import SAMPLERS, AdaptiveTimestepSampler, TimestepSampler


@DENSITIES.register("own_law")
@dataclass(frozen=True)
class OwnLaw(laws.Laplace):
    b: float = 2.0


@weighting.register("own_weight")
def own_weight(log_snr):
    return 0.5 * log_snr


@SAMPLERS.register("own_learner")
class OwnLearner(AdaptiveTimestepSampler):
    """As the square root of the loss."""

    def _rule(self, profile, constants):
        return profile**0.5


@SAMPLERS.register("own_sampler")
class OwnSampler(TimestepSampler):
    """Only the noisier half."""

    def __init__(self, scheduler, draw="iid", seed=0):
        from diffusers_curriculum.noise_levels import NoiseLevels

        super().__init__(NoiseLevels.from_scheduler(scheduler), draw=draw, seed=seed)

    def law(self, step, device):
        half = len(self.levels) // 2
        mass = torch.zeros(len(self.levels), dtype=torch.float64, device=device)
        mass[half:] = 1 / half
        return mass
'''
NAMES: dict[str, Catalogue[Any]] = {"own_law": DENSITIES, "own_weight": WEIGHTINGS}
NAMES |= {"own_learner": SAMPLERS, "own_sampler": SAMPLERS}


@pytest.fixture
def laws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of laws in the working folder, which nobody has imported; nothing of it stays."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_laws.py").write_text(LAWS)
    yield tmp_path / "my_own_laws.py"
    for name, catalogue in NAMES.items():
        if name in list(catalogue):
            catalogue.remove(name)
    sys.modules.pop("my_own_laws", None)


@pytest.fixture
def schedule(tmp_path: Path) -> str:
    DDPMScheduler().save_pretrained(tmp_path / "schedule")
    return str(tmp_path / "schedule")


def lines() -> dict[str, CommandLine]:
    tasks = (TextToImage, ClassConditional, Unconditional)
    found = {task.__name__: task.command_line for task in tasks}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "autoencoder")
        patch.syspath_prepend(ROOT / "examples" / "recipes")
        found["VQGAN"] = importlib.import_module("vqgan_task").VQGAN.command_line
        found["Mixture"] = importlib.import_module("own_job").Mixture.command_line
    return found


# -- what is imported ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my_own_laws", "my_own_laws.py", "./my_own_laws.py"])
def test_a_module_of_the_working_folder_and_a_file_are_found(laws: Path, name: str) -> None:
    assert import_modules("--import", [name, name]) == [name]
    assert import_modules("--import", [name]) == [name]  # once more is no matter
    assert all(own in catalogue for own, catalogue in NAMES.items())
    assert Path(str(sys.modules["my_own_laws"].__file__)).name == "my_own_laws.py"


@pytest.mark.parametrize("script", lines())
def test_every_script_imports(script: str, laws: Path) -> None:
    line = lines()[script]
    required = [f"--{flag.name}" for flag in line.flags if flag.required]
    words = [word for flag in required for word in (flag, "x")]
    with pytest.raises(UsageError, match="--import is no_such_module: there is no module"):
        line.parse([*words, "--import", "no_such_module"], machine=False)
    assert "own_law" not in DENSITIES
    (family,) = [f for f in line.families if "import" in {flag.name for flag in f.flags}]
    assert family.title == "the run, further"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone", None, r"no module 'gone' on the Python path or in /.*give the path"),
        ("os.gone", None, r"--import os\.gone|--import is os\.gone"),
        ("gone.py", None, "--import is gone.py: there is no such file"),
        ("json.py", "", "another module is called 'json'"),
        ("raising", "1 / 0", "--import raising cannot be imported: ZeroDivisionError: "),
        ("raising.py", "1 / 0", "--import raising.py cannot be imported: ZeroDivisionError: "),
        ("needing", "import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("taken", LAWS.replace("own_law", "laplace"), "a density named 'laplace' exists already"),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_line(
    laws: Path, name: str, content: str | None, told: str, capsys: Any, schedule: str
) -> None:
    if content is not None:
        Path(name).with_suffix(".py").write_text(content)
    with pytest.raises(UsageError, match=told):
        import_modules("--import", [name])
    for argv in (("preview", schedule), ("verify", ".")):
        assert main([*argv, "--import", name]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"diffusers-curriculum {argv[0]}: error: --import")
        assert err.count("\n") == 1


# -- previews --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own_law", "own_learner", "own_sampler"])
def test_a_preview_shows_what_is_imported(
    laws: Path, name: str, schedule: str, capsys: Any
) -> None:
    argv = ["preview", schedule, "--timestep_sampler", name]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert f"'{name}' is unknown" in told
    assert "--import" in told
    weight = ("--loss_weighting", "own_weight")
    assert main([*argv, *weight, "--import", "my_own_laws", "--output", "told.json"]) == 0
    document = json.loads(Path("told.json").read_text())
    half = sum(document["mass"][:500])
    assert document["weights"] is not None
    assert (half == 0) == (name == "own_sampler")


def test_a_saved_sampler_of_ones_own_is_read(laws: Path, capsys: Any) -> None:
    import_modules("--import", ["my_own_laws"])
    DensityTimestepSampler.from_scheduler(DDPMScheduler(), density="own_law").save_pretrained("out")
    DENSITIES.remove("own_law")
    assert main(["preview", "out"]) == 2
    del sys.modules["my_own_laws"]
    for name in ("own_weight", "own_learner", "own_sampler"):
        NAMES[name].remove(name)
    capsys.readouterr()
    assert main(["preview", "out", "--import", "my_own_laws"]) == 0
    assert capsys.readouterr().out.startswith("own_law")


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(ROOT / "examples" / "recipes")
    return importlib.import_module("own_job")


def run(recipe: Any, steps: int, *more: str) -> None:
    argv = ["--output_dir", "run", "--points", "8", "--train_batch_size", "4", "--seed", "1"]
    argv += ["--max_train_steps", str(steps), "--checkpointing_steps", "1", *more]
    reset_accelerate()
    Job(recipe.Mixture(), argv).train(recipe.training_step)


LAW = ("--timestep_sampler", "own_law")
OWN = ("--import", "my_own_laws.py")
RESUME = ("--resume_from_checkpoint", "latest")


def test_a_run_goes_on_with_the_modules_that_it_began_with(laws: Path, recipe: Any) -> None:
    run(recipe, 1, *LAW, *OWN)
    record = json.loads(Path("run/run.json").read_text("utf-8"))
    assert record["sessions"][0]["arguments"]["import"] == "['my_own_laws.py']"
    assert list(record["facts"]["imports"]) == ["my_own_laws"]
    assert inspect_run("run")[0].sampler.startswith("own_law")
    with pytest.raises(UsageError, match=r"imported my_own_laws.*give --import my_own_laws again"):
        run(recipe, 2, *LAW, *RESUME)
    run(recipe, 2, *LAW, *RESUME, "--import", "my_own_laws")  # the same by its other name
    laws.write_text(f"{LAWS}\n# not what it was\n")
    with pytest.raises(
        UsageError, match=r"imports\.my_own_laws is \w+\.\.\., was .*change imports"
    ):
        run(recipe, 3, *LAW, *RESUME, *OWN)
    allowed = ("--allow_config_change", "imports")
    run(recipe, 3, *LAW, *RESUME, *OWN, *allowed)
    assert Path("run/checkpoint-3").is_dir()
    more = ("--allow_config_change", "imports", "sampler")
    run(recipe, 4, *RESUME, *more)  # and without them, with another law
    record = json.loads(Path("run/run.json").read_text("utf-8"))
    assert any(told.startswith("imports.my_own_laws") for told in record["sessions"][-1]["changed"])


def test_a_checkpoint_alone_imports_nothing(laws: Path, recipe: Any) -> None:
    run(recipe, 1, *LAW, *OWN)
    canary = laws.with_name("imported")
    laws.write_text(f"open({str(canary)!r}, 'w')\n{LAWS}")
    sys.modules.pop("my_own_laws")
    for name, catalogue in NAMES.items():
        catalogue.remove(name)
    for more in ((), ("--allow_config_change", "imports")):
        with pytest.raises(UsageError, match=r"my_own_laws|'own_law' is unknown"):
            run(recipe, 2, *LAW, *RESUME, *more)
    inspect_run("run")
    assert not canary.exists()


# -- installed packages ----------------------------------------------------------------------------


def install(folder: Path, points: str) -> None:
    """What pip leaves of a package of that name, without its files."""
    info = folder / "own_laws-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-laws\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(points)


POINTS = """
[diffusers_curriculum.densities]
own_law = my_own_laws
[diffusers_curriculum.weightings]
own_weight = my_own_laws:own_weight
[diffusers_curriculum.samplers]
own_sampler = my_own_laws
own_learner = my_own_laws
"""


@pytest.mark.parametrize("name", NAMES)
def test_an_installed_package_is_imported_when_its_name_is_asked_for(
    laws: Path, name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(laws.parent)
    install(laws.parent, POINTS)
    assert versions()["own-laws"] == "1.5"
    assert main(["preview", schedule, "--output", "plain.json"]) == 0
    assert "my_own_laws" not in sys.modules  # nobody asked
    flag = "--loss_weighting" if name == "own_weight" else "--timestep_sampler"
    assert main(["preview", schedule, flag, name, "--output", "told.json"]) == 0
    assert Path("told.json").read_text() != Path("plain.json").read_text()


def test_a_sampler_of_an_installed_package_is_known_by_its_class(
    laws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(laws.parent)
    laws.write_text(LAWS.replace("OwnLearner", "InstalledLearner"))
    install(laws.parent, POINTS)
    config = {"_class_name": "InstalledLearner", "scheduler": {"_class_name": "DDPMScheduler"}}
    assert TimestepSampler.from_config(config).name() == "own_learner"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            "no_such_module",
            r"of the installed package own-laws 1\.5 cannot be imported \(ModuleNot",
        ),
        (
            "json",
            r"own-laws 1\.5 registers no density 'own_law', which its entry point 'json' prom",
        ),
    ],
)
def test_a_broken_package_is_named(
    laws: Path, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(laws.parent)
    install(laws.parent, f"[diffusers_curriculum.densities]\nown_law = {value}\n")
    with pytest.raises(ValueError, match=told):
        DensityTimestepSampler(DDPMScheduler(), density="own_law")
