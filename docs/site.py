"""The documents as a site: each stands at its path in the repository, so that a link leads to the
same place here and there."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("*.md", "*.png", "*.svg", "*.json", "*.py", "*.ipynb", "*.sh", "*.txt", "*.cff", "LICENSE")
PUBLIC = (
    "diffusers_curriculum",
    "diffusers_curriculum.noise_levels",
    "diffusers_curriculum.densities",
    "diffusers_curriculum.weighting",
    "diffusers_curriculum.samplers",
    "diffusers_curriculum.clustering",
    "diffusers_curriculum.pacing",
    "diffusers_curriculum.objective",
    "diffusers_curriculum.randomness",
    "diffusers_curriculum.drop_in",
    "diffusers_curriculum.pipelines",
)


def on_files(files: Any, config: Any) -> Any:
    """The files of the repository in place of those of one folder."""
    from mkdocs.structure.files import File, Files

    listed = subprocess.run(
        ["git", "ls-files", "--", *SHOWN], cwd=ROOT, check=True, capture_output=True, text=True
    )
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = [path for path in listed.stdout.splitlines() if not path.startswith((".", "tests/"))]
    own = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    shown = {str(path.relative_to(ROOT).with_suffix(".md")): page(path) for path in notebooks()}
    made = {"api.md": api()} | shown
    return Files([*theme, *own, *(File.generated(config, k, content=v) for k, v in made.items())])


def on_page_content(html: str, **_: Any) -> str:
    """Names in docstrings, without the roles of another generator."""
    return re.sub(r":(?:func|class|meth|attr|mod):(?=<code>)", "", html)


def notebooks() -> list[Path]:
    """All of them, which hold the outputs of their last run."""
    return sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def page(path: Path) -> str:
    """A notebook as Markdown, its pictures inside."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        parts += [f"```python\n{text}\n```" if is_code else text]
        parts += map(_shown, cell.get("outputs", ()))
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text") or data["text/plain"])
    return f"```text\n{text.rstrip()}\n```"


def public_names(module: str) -> list[str]:
    """What a module exports: its ``__all__``, or the classes and functions that it defines."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(path.read_text("utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    defined = [n.name for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return sorted(name for name in defined if not name.startswith("_"))


def api() -> str:
    """The page of all public names, each with its docstring."""
    pages = ["# API", ""]
    for module in PUBLIC:
        names = public_names(module)
        pages += [f"## {module}", "", *(f"::: {module}.{name}\n" for name in names)]
    return "\n".join(pages)
