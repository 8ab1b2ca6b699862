"""What the layout test looks for in a syntax tree; each finding is one readable line."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "diffusers_curriculum"
FLOORS = {
    "catalogue": 0,
    "checks": 0,
    "noise_levels": 0,
    "densities": 0,
    "randomness": 0,
    "clustering": 1,
    "pacing": 1,
    "weighting": 1,
    "objective": 1,
    "average_velocity": 1,
    "samplers": 2,
    "inference_spacing": 2,
    "drop_in": 2,
    "analysis": 3,
    "metrics": 3,
    "models": 3,
    "pipelines": 3,
    "training": 4,
    "cli": 5,
}
# The rooms of training/, each on those before it.
ROOMS = (
    "errors",
    "arguments",
    "storage",
    "process",
    "data",
    "levels",
    "cache",
    "checkpoint",
    "parts",
    "publish",
    "evaluation",
    "loop",
    "tasks",
)
CORE_LIBRARIES = {"torch", "numpy", "safetensors", "diffusers", PACKAGE} | sys.stdlib_module_names
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
GLOBAL_TORCH = {
    "bernoulli",
    "multinomial",
    "normal",
    "poisson",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
}
OWN_NUMPY = {"Generator", "Philox", "PCG64", "SeedSequence", "default_rng", "BitGenerator"}


def room(module: str) -> str | None:
    """The name below the package: "samplers" of "diffusers_curriculum.samplers.base"."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def training_room(module: str) -> str | None:
    """The room of training/: "loop" of "diffusers_curriculum.training.loop.job"."""
    parts = module.split(".")
    return parts[2] if room(module) == "training" and len(parts) > 2 else None


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, late imports and type-checking ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from package import module` imports the module.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def import_findings(tree: ast.AST, module: str) -> Iterator[str]:
    """Relative, upward and foreign imports of one module of the package."""
    own = room(module)
    for line, name in imported_modules(tree):
        if name.startswith("."):
            yield f"{module}:{line} imports {name} relatively; write the full name"
        elif own is None:
            continue
        elif own not in FLOORS:
            yield f"{module}:{line} stands on no floor; give {own!r} one"
        else:
            yield from _floor_findings(module, own, line, name)


def _floor_findings(module: str, own: str, line: int, name: str) -> Iterator[str]:
    floor, other = FLOORS[own], room(name)
    below = FLOORS.get(other or "", 99) <= floor or name == f"{PACKAGE}.__version__"
    if name.split(".")[0] == PACKAGE and not below:
        yield f"{module}:{line} on floor {floor} imports {name}, which is not below it"
    inside, below = training_room(module), training_room(name)
    if inside is not None and inside not in ROOMS:
        yield f"{module}:{line} stands in no room of training/; give {inside!r} a place"
    elif inside and below and below in ROOMS and ROOMS.index(below) > ROOMS.index(inside):
        yield f"{module}:{line} in {inside}/ imports {name}, which is not below it"
    if floor <= 2 and name.split(".")[0] not in CORE_LIBRARIES:
        yield f"{module}:{line} on floor {floor} imports {name}; only the training floors may"


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Import circles among modules, given what each module imports."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for name in sorted(imports.get(module, ())):
                visit(name, [*path, module])
            done.add(module)

    for module in sorted(imports):
        visit(module, [])
    return found


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which modules of ``trees`` each of them imports, by full name."""
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        names = {name for _, name in imported_modules(tree)}
        targets = {name if name in trees else name.rpartition(".")[0] for name in names}
        graph[module] = {target for target in targets if target in trees and target != module}
    return graph


def forbidden(
    tree: ast.AST, module: str, may_print: bool = False, may_seed: bool = False
) -> Iterator[str]:
    """Calls and statements that library code must not hold.

    Args:
        may_print: for the command line, whose answers go to standard output.
        may_seed: for a script, which owns its process: models that draw inside themselves
            (dropout) know the global generator only, so it is seeded from the step there.
    """
    seeded = _inside_fork_rng(tree)
    for node in ast.walk(tree):
        for what in _forbidden(node, may_seed or id(node) in seeded, may_print):
            yield f"{module}:{getattr(node, 'lineno', 0)} {what}"


def _forbidden(node: ast.AST, seeded: bool, may_print: bool) -> Iterator[str]:
    if isinstance(node, ast.Assert):
        yield "assert: raise an error that shows the value and the remedy"
    elif isinstance(node, ast.ExceptHandler) and node.type is None:
        yield "bare except: name the errors"
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from _forbidden_imports(node)
    elif isinstance(node, ast.Call):
        yield from _forbidden_calls(node, seeded, may_print)


def _forbidden_imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    source = node.module if isinstance(node, ast.ImportFrom) else None
    names = [source] if source else [alias.name for alias in node.names]
    for name in names:
        if name.split(".")[0] in UNPICKLERS:
            yield f"imports {name}: unpickling runs code"
        if name == "random" or name.startswith("numpy.random"):
            yield f"imports {name}: use the keyed generators"
    if source == "torch" and any(alias.name == "load" for alias in node.names):
        yield "imports torch.load: it unpickles"


def _forbidden_calls(node: ast.Call, seeded: bool, may_print: bool) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    trusted = keywords.get("trust_remote_code")
    if name in {"torch.load", "eval", "exec", "compile", "__import__"}:
        yield f"{name}(): runs code from data"
    if trusted is not None and not (isinstance(trusted, ast.Constant) and trusted.value is False):
        yield "trust_remote_code: only False may be passed"
    if name == "print" and not may_print:
        yield "print(): use logging"
    yield from _global_randomness(name, "generator" in keywords, seeded)


def _global_randomness(name: str, has_generator: bool, seeded: bool) -> Iterator[str]:
    owner, _, function = name.rpartition(".")
    if owner == "torch" and function in GLOBAL_TORCH and not has_generator:
        yield f"{name}() draws from the global generator; pass generator="
    if owner in {"torch", "torch.random"} and function in {"manual_seed", "seed"} and not seeded:
        yield f"{name}() sets the global generator; do it inside torch.random.fork_rng"
    if owner in {"np.random", "numpy.random"} and function not in OWN_NUMPY:
        yield f"{name}() draws from the global generator"
    if owner == "random":
        yield f"{name}() draws from the global generator"


def _inside_fork_rng(tree: ast.AST) -> set[int]:
    """Ids of all nodes inside a `with torch.random.fork_rng(...)`, which puts everything back."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any("fork_rng(" in ast.unparse(item.context_expr) for item in node.items)
    ]
    return {id(inner) for block in blocks for inner in ast.walk(block)}


def function_lengths(tree: ast.AST) -> dict[str, int]:
    """Lines of every function from ``def`` to its last line; a repeated name keeps its longest."""
    lengths: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            lengths[f"{node.name}:{node.lineno}"] = lines
    return lengths


def parse(files: Iterable[Path], root: Path) -> dict[str, ast.Module]:
    """Syntax tree of every file under its module name."""
    trees = {}
    for path in sorted(files):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text("utf-8"), str(path))
    return trees
