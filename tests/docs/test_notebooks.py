"""Notebooks hold what their code gives: outputs of one run from the start, and of this code."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from docs.run_notebooks import executed
from docs.site import notebooks, page

NOTEBOOKS = {path.stem: path for path in notebooks()}


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def outputs(cells: list[Any]) -> list[Any]:
    """What is printed, word by word, and where pictures stand."""
    found = []
    for cell in cells:
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = output.get("text") or data.get("text/plain", "")
            found.append("a picture" if "image/png" in data else "".join(text))
    return found


def rounded(text: str) -> str:
    """Without the decimals of losses, which differ from one kind of processor to another."""
    return re.sub(r"\d\.\d\d\b", "#", text)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_was_run_in_order_and_holds_its_outputs(name: str) -> None:
    cells = code_cells(NOTEBOOKS[name])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert "a picture" in outputs(cells)
    assert all(each["output_type"] != "error" for cell in cells for each in cell["outputs"])
    told = "".join(outputs(cells))
    assert not re.search(r"/(home|root|tmp|work|Users)/|Warning", told)
    for cell in cells:
        compile("".join(cell["source"]), name, "exec")
    text = page(NOTEBOOKS[name])
    assert text.startswith("# ")
    assert text.count("](data:image/png;base64,") == outputs(cells).count("a picture")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_gives_the_same(name: str) -> None:
    if not (find_spec("nbclient") and find_spec("ipykernel")):
        pytest.skip("needs pip install nbclient ipykernel")
    cells = [cell for cell in executed(NOTEBOOKS[name]).cells if cell.cell_type == "code"]
    ran, kept = outputs(cells), outputs(code_cells(NOTEBOOKS[name]))
    assert [rounded(text) for text in ran] == [rounded(text) for text in kept]
