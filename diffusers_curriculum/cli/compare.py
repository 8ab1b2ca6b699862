"""`diffusers-curriculum compare`: runs side by side, from the records that they left."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ENDINGS = (".md", ".json", ".png", ".svg", ".html")


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "compare",
        help="show training runs side by side: settings that differ, losses, metrics",
        description="Compare training runs by the records in their output folders: settings that"
        " differ, validation loss as a whole and at each noise level, training loss per noise"
        " level, and metrics, at the last step that all of them have. No model is loaded.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the --output_dir of a training run")
    parser.add_argument(
        "--output",
        metavar="FILE",
        nargs="+",
        default=[],
        help=f"write tables, numbers or plots instead: {', '.join(ENDINGS)}",
    )
    parser.set_defaults(handler=_compare)


def _compare(args: argparse.Namespace) -> tuple[str, int]:
    """Read, then write; imported late so that `--help` need not wait."""
    files = [Path(name) for name in args.output]
    for file in files:
        if file.suffix not in ENDINGS:
            raise ValueError(f"--output {file}: the name must end in {', '.join(ENDINGS)}.")
        if not file.absolute().parent.is_dir():
            raise ValueError(f"--output {file}: there is no folder {file.parent}. Create it first.")
    from diffusers_curriculum.analysis.runs import as_json, markdown, named_runs, sections

    runs = named_runs(args.runs)
    tables = sections(runs)
    for file in files:
        if file.suffix == ".md":
            file.write_text(markdown(tables) + "\n", "utf-8")
        elif file.suffix == ".json":
            file.write_text(json.dumps(as_json(runs), indent=2) + "\n", "utf-8")
        else:
            _draw(file, runs, tables)
    return markdown(tables) if not files else "\n".join(map(str, files)), 0


def _draw(file: Path, runs: dict, tables: list) -> None:
    from diffusers_curriculum.analysis.page import Plot, Section, page, section
    from diffusers_curriculum.analysis.plots import save_figure
    from diffusers_curriculum.analysis.run_plots import plot_runs

    figure = plot_runs(runs)
    if file.suffix == ".html":
        reading = "Each run in a colour of its own; losses by noise level at the last common step."
        curves = [Section("Curves", [Plot(figure, reading)])] if figure is not None else []
        body = [line for each in (*curves, *tables) for line in section(each)]
        file.write_text(page("Runs side by side", body), "utf-8")
    elif figure is None:
        raise ValueError(
            f"--output {file}: no run has left numbers to draw. Give --validation_split to a run, "
            "or let one end."
        )
    else:
        save_figure(figure, file)
