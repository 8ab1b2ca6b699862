"""The documents tell the truth: their code runs, their links and commands lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GLOBS = ("[!C]*.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/*.md", "examples/*/README.md")
DOCUMENTS = sorted(file for glob in GLOBS for file in ROOT.glob(glob))
TEXTS = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in DOCUMENTS}


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, code) of every fenced block in a language."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [(name, code) for name, text in TEXTS.items() for code in pattern.findall(text)]


@pytest.mark.parametrize(("name", "code"), [b for b in blocks("python") if "import" in b[1]])
def test_python_with_its_imports_runs(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {"__name__": "document"})


@pytest.mark.parametrize("name", TEXTS)
def test_local_links_exist(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", TEXTS[name])
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not ((ROOT / name).parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_named_test_files_exist(name: str) -> None:
    files = re.findall(r"\b(tests/[\w/.]+|benchmarks/[\w.]+\.(?:sh|py))", TEXTS[name])
    assert not [file for file in files if not (ROOT / file).exists()]


def test_named_tests_exist() -> None:
    named = set(re.findall(r"`(?:\.\.\.)?(test_\w+)", "\n".join(TEXTS.values())))
    sources = "\n".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", sources))
    assert len(named) > 30
    assert not named - defined - {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


def script_parsers() -> dict[str, Any]:
    from diffusers_curriculum.training.tasks.flow import FlowTransformer
    from diffusers_curriculum.training.tasks.image_tokens import ImageTokens
    from diffusers_curriculum.training.tasks.text_to_image_lora_sdxl import TextToImageLoraSDXL
    from diffusers_curriculum.training.tasks.text_to_image_sdxl import TextToImageSDXL
    from tests.training.command_lines import (
        build_class_parser,
        build_lora_parser,
        build_parser,
        build_unconditional_parser,
    )

    return {
        "train_text_to_image_curriculum": build_parser(),
        "train_text_to_image_sdxl_curriculum": TextToImageSDXL.command_line.parser(),
        "train_text_to_image_lora_curriculum": build_lora_parser(),
        "train_text_to_image_lora_sdxl_curriculum": TextToImageLoraSDXL.command_line.parser(),
        "train_text_to_image_flow_curriculum": FlowTransformer.command_line.parser(),
        "train_class_conditional_curriculum": build_class_parser(),
        "train_unconditional_curriculum": build_unconditional_parser(),
        "train_image_tokens_curriculum": ImageTokens.command_line.parser(),
    }


@pytest.mark.parametrize("script", script_parsers())
def test_flags_in_commands_exist(script: str) -> None:
    actions = script_parsers()[script]._actions
    known = {option for action in actions for option in action.option_strings}
    commands = [code for _, code in blocks("bash") if script in code]
    used = {flag for code in commands for flag in re.findall(r"--\w+", code)}
    assert commands
    assert used <= known


def test_tables_name_every_density_and_weighting() -> None:
    from diffusers_curriculum.clustering import CLUSTERINGS
    from diffusers_curriculum.densities import DENSITIES
    from diffusers_curriculum.pacing import PACINGS
    from diffusers_curriculum.randomness import DRAWS
    from diffusers_curriculum.samplers import learning_samplers
    from diffusers_curriculum.weighting import WEIGHTINGS

    named = set(re.findall(r"`(\w+)`", TEXTS["README.md"]))
    assert {*DENSITIES, *learning_samplers(), *PACINGS, *DRAWS, *CLUSTERINGS} <= named
    assert set(WEIGHTINGS) <= set(re.findall(r"\[`(\w+)`\]", TEXTS["docs/catalogue.md"]))
