"""Every command of the documents works as printed: it is run where that is cheap, else read by the
parsers that would read it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import pytest

from diffusers_curriculum.cli import build_parser, main
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.training.levels.timesteps import length_fault
from diffusers_curriculum.training.loop.task import Task
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.flow import FlowTransformer
from diffusers_curriculum.training.tasks.image_tokens import ImageTokens
from diffusers_curriculum.training.tasks.levels import LevelTask
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora
from diffusers_curriculum.training.tasks.text_to_image_lora_sdxl import TextToImageLoraSDXL
from diffusers_curriculum.training.tasks.text_to_image_sdxl import TextToImageSDXL
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from tests.docs.test_documents import ROOT, TEXTS, blocks
from tests.floors_fixtures import SD
from tests.scripts.small_runs import tiny_vit_vq
from tests.training.parts.families.flow_benches import pipeline_of

TASKS: dict[str, type[Task]] = {
    "train_text_to_image_curriculum": TextToImage,
    "train_text_to_image_sdxl_curriculum": TextToImageSDXL,
    "train_text_to_image_lora_curriculum": TextToImageLora,
    "train_text_to_image_lora_sdxl_curriculum": TextToImageLoraSDXL,
    "train_text_to_image_flow_curriculum": FlowTransformer,
    "train_class_conditional_curriculum": ClassConditional,
    "train_unconditional_curriculum": Unconditional,
    "train_image_tokens_curriculum": ImageTokens,
}
VQGAN = "train_vit_vqgan"
PROGRAMS = ("accelerate", "bash", "diffusers-curriculum", "hf", "make", "pip", "pytest", "python")
COMMAND = rf"(?:\w+=\S+ )?(?:{'|'.join(PROGRAMS)}) [^`\n]+"
EXAMPLE_LENGTH = 22_600  # of a run whose command gives epochs: README's curriculum fits from there


def commands() -> dict[str, list[str]]:
    """The words of each command, under the document and its first words."""
    lines = [(name, line) for name, code in blocks("bash") for line in _lines(code)]
    for name, text in TEXTS.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        lines += [(name, code) for code in re.findall(rf"^ {{4}}({COMMAND})$", prose, re.MULTILINE)]
        lines += [(name, code) for code in re.findall(rf"`({COMMAND})`", prose)]
    found = {f"{name}: {line}": shlex.split(line, comments=True) for name, line in lines}
    for words in found.values():
        if "=" in words[0]:  # a variable of the environment
            del words[0]
    return found


def _lines(code: str) -> list[str]:
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]


COMMANDS = commands()


def of_program(*programs: str, least: int = 2) -> list[str]:
    """The commands of some programs; with more than a name where ``least`` words are asked for."""
    found = COMMANDS.items()
    return [name for name, words in found if words[0] in programs and len(words) >= least]


PREVIEWS = [n for n in of_program("diffusers-curriculum", least=3) if COMMANDS[n][1] == "preview"]


def test_every_command_is_of_a_kind_that_is_looked_at_here() -> None:
    assert len(COMMANDS) > 40
    assert len(PREVIEWS) >= 3
    assert not [name for name, words in COMMANDS.items() if words[0] not in PROGRAMS]


# -- run -------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what a preview reads of a pipeline, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    folder = tmp_path / "my_pipeline"
    diffusers.DDPMScheduler(**SD, clip_sample=False).save_pretrained(folder / "scheduler")  # type: ignore[arg-type]
    (sources,) = [code for name, code in blocks("json") if name == "docs/data.md"]
    (tmp_path / "sources.json").write_text(sources)
    (flags,) = [code for name, code in blocks("yaml") if name == "docs/configuration.md"]
    (tmp_path / "naruto").mkdir()
    for file in ("run.yaml", "naruto/run.yaml"):
        (tmp_path / file).write_text(flags)
    (folder / "model_index.json").write_text('{"scheduler": ["diffusers", "DDPMScheduler"]}')
    yield folder
    if "own_density" in sys.modules:  # of a command with --import
        DENSITIES.remove("triangle")
        del sys.modules["own_density"]


@pytest.mark.usefixtures("pipeline")
@pytest.mark.parametrize("name", PREVIEWS)
def test_a_preview_is_drawn(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [{"SOURCE": "my_pipeline", "NAME": "laplace"}.get(w, w) for w in COMMANDS[name]]
    assert main(words[1:]) == 0
    told = capsys.readouterr()
    assert "refused" not in told.out
    assert told.err == ""
    if "--output" in words:
        assert Path(words[words.index("--output") + 1]).stat().st_size > 10_000


@pytest.mark.parametrize("name", [name for name in of_program("python") if "digits.py" in name])
def test_the_scans_are_exported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "text_to_image")
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module("digits").main(COMMANDS[name][2:]) == 0
    assert len(list(tmp_path.rglob("*.png"))) == 1797


# -- read ------------------------------------------------------------------------------------------


def training(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Script and arguments of a command that trains in this library; None for another one."""
    for place, word in enumerate(words):
        if Path(word).stem in {*TASKS, VQGAN}:
            return Path(word).stem, list(words[place + 1 :])
    return None


@pytest.mark.parametrize("name", [name for name in COMMANDS if training(COMMANDS[name])])
def test_a_training_would_start(
    name: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags, needs and bounds; and for what is not on the Hub the levels, and the length of the
    curriculum against the run's."""
    found = training(COMMANDS[name])
    assert found is not None
    script, words = found
    (path,) = [word for word in COMMANDS[name] if Path(word).stem == script]
    assert (ROOT / (path if "/" in path else f"{path}.py")).is_file()
    if script == VQGAN:
        monkeypatch.syspath_prepend(ROOT / "examples" / "autoencoder")
        importlib.import_module("vqgan_task").VQGAN().parse(words, machine=False)
        return
    if script.startswith("train_text_to_image"):
        source = pipeline_of("flux") if "flow" in script else pipeline
        words += ["--pretrained_model_name_or_path", str(source)]
    if script == "train_image_tokens_curriculum":
        resolution = int(words[words.index("--resolution") + 1])
        tiny_vit_vq(resolution // 8, side=8).save_pretrained(tmp_path)
        words += ["--pretrained_vae_model_name_or_path", str(tmp_path)]
    task = TASKS[script]()
    assert isinstance(task, LevelTask)
    if "facebook/DiT-XL-2-256" in words:  # its scheduler is asked for
        task.command_line.parse([*words, "--formulation", "ddpm"], machine=False)
        return
    args = task.parse(words, machine=False)
    levels = task.choose_levels(args, 0)
    steps = args.max_train_steps or EXAMPLE_LENGTH
    assert length_fault(args, levels.sampler, steps) is None


@pytest.mark.parametrize("name", of_program("diffusers-curriculum"))
def test_a_subcommand_takes_the_flags(name: str) -> None:
    words = [{"SOURCE": "my_pipeline", "NAME": "laplace"}.get(w, w) for w in COMMANDS[name][1:]]
    if len(words) == 1:  # the name of a subcommand alone
        assert words[0] in build_parser().format_help()
        return
    build_parser().parse_args(words)


@pytest.mark.parametrize("name", of_program("python", "pytest", "bash"))
def test_a_program_is_there_and_has_the_flags(name: str) -> None:
    words = [word.strip("[]") for word in COMMANDS[name] if word != "python"]
    if words[0] == "-m":
        words = words[1:]
    if words[0] == "pytest":
        assert not [w for w in words if w.startswith("tests/") and not (ROOT / w).exists()]
        return
    source = _source(words[0] if words[0] != "bash" else words[1])
    if "--here" in words:  # what follows are the script's
        at = words.index("--here")
        known = {f"--{flag.name}" for flag in TextToImage.command_line.flags}
        assert {word for word in words[at + 1 :] if word.startswith("--")} <= known
        words = words[: at + 1]
    assert not [word for word in words[1:] if word.startswith("--") and word[2:] not in source]


def _source(program: str) -> str:
    """The text of a file or a module, and of what makes flags for it."""
    path = ROOT / program
    if not path.is_file() and not program.endswith((".py", ".sh")):
        spec = importlib.util.find_spec(program)
        assert spec is not None, program
        assert spec.origin is not None
        path = Path(spec.origin)
        path = path.with_name("__main__.py") if path.name == "__init__.py" else path
    flags = ROOT / "docs" / "flags.md"
    return path.read_text("utf-8") + (flags.read_text("utf-8") if "own_job" in program else "")


@pytest.mark.parametrize("name", of_program("make"))
def test_a_target_exists(name: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {word for word in COMMANDS[name][1:] if "=" not in word} <= {*targets}


@pytest.mark.parametrize("name", of_program("pip"))
def test_an_extra_exists(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    own = re.findall(r"(?:diffusers-curriculum|\.)\[(\w+)\]", name)
    assert set(own) <= {*extras["optional-dependencies"]}
