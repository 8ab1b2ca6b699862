"""Writes the pictures in docs/architecture.md and the tables of docs/flags.md from the code.

    python -m docs.generate_architecture

Both are functions of the code alone, and a test compares them with the files.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.flag import Flag
from diffusers_curriculum.training.tasks.class_conditional import ClassConditional
from diffusers_curriculum.training.tasks.flow import FlowTransformer
from diffusers_curriculum.training.tasks.image_tokens import ImageTokens
from diffusers_curriculum.training.tasks.text_to_image import TextToImage
from diffusers_curriculum.training.tasks.text_to_image_lora import TextToImageLora
from diffusers_curriculum.training.tasks.text_to_image_lora_sdxl import TextToImageLoraSDXL
from diffusers_curriculum.training.tasks.text_to_image_sdxl import TextToImageSDXL
from diffusers_curriculum.training.tasks.unconditional import Unconditional

ROOT = Path(__file__).resolve().parents[1]
DOCS = Path(__file__).parent
PACKAGE = "diffusers_curriculum"
sys.path.append(str(ROOT / "examples" / "autoencoder"))
SCRIPTS = {
    "train_text_to_image_curriculum.py": TextToImage.command_line,
    "train_text_to_image_sdxl_curriculum.py": TextToImageSDXL.command_line,
    "train_text_to_image_lora_curriculum.py": TextToImageLora.command_line,
    "train_text_to_image_lora_sdxl_curriculum.py": TextToImageLoraSDXL.command_line,
    "train_text_to_image_flow_curriculum.py": FlowTransformer.command_line,
    "train_class_conditional_curriculum.py": ClassConditional.command_line,
    "train_unconditional_curriculum.py": Unconditional.command_line,
    "train_image_tokens_curriculum.py": ImageTokens.command_line,
    "train_vit_vqgan.py": import_module("vqgan_task").VQGAN.command_line,
}
_HEAD = """<!-- Written by `python -m docs.generate_architecture`; do not edit. -->

# Flags

Every flag of the training scripts, as it is declared in `diffusers_curriculum/training/arguments`
and in the tasks. "Setting" is the name under which `--allow_config_change` lets a resumed run
change it; a flag without one may change freely. "Needs" says without what it would do nothing, and
is refused. "Told" are those whose value trackers and run.json may tell.
"""


# -- rooms -----------------------------------------------------------------------------------------


def rooms(folder: str) -> dict[str, set[str]]:
    """Which rooms of a folder of the package import which others; late imports count."""
    root, found = ROOT / folder, defaultdict(set)
    prefix = folder.replace("/", ".")
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root).with_suffix("").parts[0]
        for name in _imported(ast.parse(path.read_text("utf-8"))):
            if name.startswith(f"{prefix}."):
                found[own].add(name.removeprefix(f"{prefix}.").partition(".")[0])
    known = {p.stem for p in root.iterdir() if p.is_dir() or p.suffix == ".py"} - {"__init__"}
    return {room: (found[room] & known) - {room} for room in sorted(known) if found[room]}


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def picture(folder: str) -> str:
    """A mermaid flow chart of the rooms; an arrow that others imply is left out."""
    imports = rooms(folder)
    lines = ["```mermaid", "flowchart TD"]
    for room, below in imports.items():
        implied = {far for near in below for far in _reached(imports, near)}
        lines += [f"    {room} --> {name}" for name in sorted(below - implied)]
    return "\n".join([*lines, "```"])


def _reached(imports: dict[str, set[str]], room: str) -> set[str]:
    """All rooms below one, in any number of arrows."""
    below = imports.get(room, set())
    return below.union(*(_reached(imports, name) for name in below)) if below else set()


def architecture(text: str) -> str:
    """The text of docs/architecture.md with its pictures renewed."""
    for folder in (PACKAGE, f"{PACKAGE}/training"):
        mark = re.escape(f"<!-- rooms of {folder} -->")
        pattern = re.compile(rf"({mark}\n\n)```mermaid\n.*?```", re.DOTALL)
        text = pattern.sub(lambda found, folder=folder: found[1] + picture(folder), text)
    return text


# -- flags -----------------------------------------------------------------------------------------


def flags() -> str:
    """The text of docs/flags.md."""
    parts = [f"## {script}\n\n{_table(line)}" for script, line in SCRIPTS.items()]
    return "\n\n".join([_HEAD.rstrip(), *parts]) + "\n"


def _table(line: CommandLine) -> str:
    head = "| flag | default | what it does | setting | needs | told |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(_row(flag) for flag in line.flags)])


def _row(flag: Flag) -> str:
    unset = flag.default is None or flag.default is False or flag.default == ()
    default = "" if unset else f"`{flag.default}`"
    choices = f" ({', '.join(flag.choices)})" if flag.choices else ""
    needs = "; ".join(need.told for need in flag.needs)
    told = "yes" if flag.tracked else "no"
    cells = (f"`--{flag.name}`", default, flag.help + choices, flag.setting or "", needs, told)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Write both files."""
    path = DOCS / "architecture.md"
    path.write_text(architecture(path.read_text("utf-8")), "utf-8")
    (DOCS / "flags.md").write_text(flags(), "utf-8")
    sys.stdout.write(f"{path}\n{DOCS / 'flags.md'}\n")


if __name__ == "__main__":
    main()
