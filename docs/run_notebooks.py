"""Runs the notebooks of docs/notebooks and keeps their outputs: ``python -m docs.run_notebooks``,
with nbclient and ipykernel installed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from docs.site import notebooks

_LANGUAGE = {"name": "python"}


def executed(path: Path) -> Any:
    """A notebook with the outputs that it has now, run from its start in an empty folder; what it
    writes to the error stream is left out, and an error in a cell is raised."""
    import nbformat  # pyright: ignore[reportMissingImports]
    from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        options = {"timeout": 300, "coalesce_streams": True}
        NotebookClient(notebook, resources=resources, **options).execute()
    notebook.metadata["language_info"] = _LANGUAGE
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            for data in (output.get("data", {}) for output in cell.outputs):
                data.pop("image/jpeg", None)  # the same once more
    return notebook


if __name__ == "__main__":
    import nbformat  # pyright: ignore[reportMissingImports]

    for path in notebooks():
        nbformat.write(executed(path), path)
