"""Saved pipelines that bring their own code, so that diffusers loads them without this package."""

from __future__ import annotations

import ast
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers_curriculum import __version__
from diffusers_curriculum.models.loading import PART_MODULES

PACKAGE = "diffusers_curriculum"
PIPELINE_MODULE = "pipeline"  # diffusers' word for the module of a whole pipeline


class SelfContained:
    """Of pipelines: what is saved holds pipeline.py, and the module of a part that needs one.

    diffusers runs these with ``trust_remote_code=True``; a class of this package that loads what it
    has saved takes its own code instead, and runs none of the folder.
    """

    def save_config(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write model_index.json and the modules that it names."""
        super().save_config(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder, kind = Path(save_directory), type(self)
        index = json.loads((folder / self.config_name).read_text("utf-8"))
        index["_class_name"] = [PIPELINE_MODULE, kind.__name__]
        (folder / f"{PIPELINE_MODULE}.py").write_text(one_module(kind), "utf-8")
        for name, entry in index.items():
            if isinstance(entry, list) and entry[-1] in PART_MODULES:
                module, _ = PART_MODULES[entry[-1]]
                index[name] = [module, entry[-1]]
                code = one_module(type(getattr(self, name)))
                (folder / name / f"{module}.py").write_text(code, "utf-8")
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / self.config_name).write_text(text, "utf-8")

    @classmethod
    def load_config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """The index, with this package's classes of parts in place of those in the folder."""
        found = super().load_config(*args, **kwargs)  # type: ignore[misc]
        index = found[0] if isinstance(found, tuple) else found
        for name, entry in index.items():
            if isinstance(entry, list) and entry[-1] in PART_MODULES:
                module = import_module(PART_MODULES[entry[-1]][1])  # diffusers imports none
                index[name] = [module.__name__, entry[-1]]
        return found

    @classmethod
    def _dict_from_json_file(cls: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What diffusers reads an index with, also before it downloads: this class is the one."""
        index = super()._dict_from_json_file(*args, **kwargs)  # type: ignore[misc]
        if is_own_pipeline(index.get("_class_name")):
            index["_class_name"] = index["_class_name"][1]
        return index


def is_own_pipeline(name: Any) -> bool:
    """Whether the class in a model_index.json is one of this package, with its code beside it."""
    own = ("ClassConditionalPipeline", "ImageTokenPipeline", "UnconditionalPipeline")
    return isinstance(name, list | tuple) and tuple(name) in {(PIPELINE_MODULE, k) for k in own}


def one_module(kind: type) -> str:
    """Return the source of a class of this package as one module, with all that it uses of the
    package before it; a ValueError says that two things in it would have one name."""
    sources = _Sources()
    sources.add(kind.__module__, kind.__name__)
    title = f'"""{kind.__name__} of diffusers-curriculum {__version__}."""'
    head = [title, "", "from __future__ import annotations", "", *sorted(sources.imports)]
    return "\n\n\n".join(["\n".join(head), *sources.definitions]) + "\n"


class _Sources:
    """Definitions of the package, each after those that it uses, and the imports of all."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.definitions: list[str] = []
        self._modules: dict[str, str] = {}  # of each definition

    def add(self, module: str, name: str) -> None:
        """Add what ``module`` calls ``name``."""
        text, bound = _read(module)
        node = bound[name]
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._add_import(node, name)
        elif name not in self._modules:
            self._modules[name] = module
            for used in sorted(_used(node) & bound.keys() - {name, SelfContained.__name__}):
                self.add(module, used)
            self.definitions.append(_definition(node, text))
        elif self._modules[name] != module:
            raise ValueError(f"{name} is in {self._modules[name]} and in {module}: rename one.")

    def _add_import(self, node: ast.Import | ast.ImportFrom, name: str) -> None:
        source = getattr(node, "module", None) or ""
        if source.split(".")[0] == PACKAGE:
            self.add(source, name)
            return
        names = [each for each in node.names if (each.asname or each.name) == name]
        alone = ast.ImportFrom(source, names, 0) if source else ast.Import(names)
        self.imports.add(ast.unparse(alone))


def _read(module: str) -> tuple[str, dict[str, ast.stmt]]:
    """The text of a module, and the statements that bind its names."""
    text = Path(str(import_module(module).__file__)).read_text("utf-8")
    return text, {name: node for node in ast.parse(text).body for name in _bound(node)}


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [each.asname or each.name for each in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _used(node: ast.stmt) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _definition(node: ast.stmt, text: str) -> str:
    """The lines of a definition, decorators included."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    return "\n".join(lines).replace(f"({SelfContained.__name__}, ", "(", 1)
