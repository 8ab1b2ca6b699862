"""Modules of one's own, which register laws, weightings and samplers before any name is looked up.

What is imported stands on the command line, or is installed; no file of a run is asked.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers_curriculum.training.arguments.flag import tracked
from diffusers_curriculum.training.errors import UsageError


def import_modules(flag: str, names: Sequence[str] | None) -> list[str]:
    """Import each of ``names``, a module or a file of Python, and return them.

    Raises:
        UsageError: there is no such module, or it cannot be imported.
    """
    chosen = list(dict.fromkeys(names or ()))
    for name in chosen:
        load = _from_file if name.endswith(".py") else _from_path
        try:
            load(name)
        except UsageError:
            raise
        except Exception as error:  # whatever the code of others raises
            raise UsageError(
                f"{flag} {name} cannot be imported: {type(error).__name__}: {error}. Mend the "
                f"module, or drop {flag}."
            ) from error
    return chosen


def module_name(name: str) -> str:
    """The name of a module, given it or its .py file."""
    return Path(name).stem if name.endswith(".py") else name


def _from_path(name: str) -> None:
    """A module by its name, from the Python path or the working folder."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that nothing there stands in for what is installed
    importlib.invalidate_caches()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise UsageError(
            f"--import is {name}: there is no module {error.name!r} on the Python path or in "
            f"{folder}. Install it, change to its folder, or give the path of its .py file."
        ) from None


def _from_file(name: str) -> None:
    """A file as the module of its own name."""
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"--import is {path}: there is no such file. Give one, or a module.")
    before = sys.modules.get(path.stem)
    if before is not None and Path(before.__file__ or "").resolve() == path.resolve():
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if before is not None or spec is None or spec.loader is None:
        raise UsageError(
            f"--import is {path}: another module is called {path.stem!r}. Rename the file."
        )
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


IMPORT = tracked(
    "import",
    str,
    None,
    "modules, or .py files, that register densities, weightings or samplers of your own",
    dest="imports",
    nargs="+",
    metavar="MODULE",
    convert=import_modules,
)
