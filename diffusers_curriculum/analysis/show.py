"""A preview in the form that is asked for: a picture, numbers, or text for a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from diffusers_curriculum.analysis.preview import Preview
from diffusers_curriculum.analysis.terminal import characters_for, render

TERMINAL = "terminal"


def show(preview: Preview, where: str) -> str:
    """Write ``preview`` to a .json, .png or .svg file, or nowhere, and say it in text.

    Args:
        where: name of the file, or "terminal" for none.

    Returns:
        The whole preview as text for "terminal", else a line on the file, and any warnings.

    Raises:
        OSError: the file could not be written.
    """
    if where == TERMINAL:
        return render(preview, characters_for(sys.stdout.encoding))
    if where.endswith(".json"):
        Path(where).write_text(json.dumps(preview.to_json(), allow_nan=False) + "\n", "utf-8")
    else:
        # here, as matplotlib takes part of a second and the other forms do without it
        from diffusers_curriculum.analysis.plots import plot_preview, save_figure

        save_figure(plot_preview(preview), where)
    warnings = [f"warning: {warning}" for warning in preview.warnings]
    return "\n".join([f"{where}: {preview.title}", *warnings])
