"""A page of HTML that asks for nothing else: pictures are part of it, no script, no request."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #f3f5f7; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #15181c; --soft: #21262c; --line: #3d444d; }
  figure img { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; max-width: 36rem; }
figure img { width: 100%; height: auto; display: block; background: #fff; }
figcaption { font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child, .words th { text-align: left; }
td.text { white-space: normal; text-align: left; min-width: 8rem; }
dt { font-weight: bold; } dd { margin: 0 0 .6rem 1rem; }
code { background: var(--soft); padding: .1rem .3rem; overflow-wrap: anywhere; }
aside { background: var(--soft); border-left: .25rem solid var(--line); padding: .5rem .8rem; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, eq=False)
class Plot:
    """A picture, and how to read it in a sentence."""

    figure: Figure
    reading: str


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of words and numbers under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False)
class Section:
    """Plots beside each other, and a table below them."""

    title: str
    plots: Sequence[Plot] = ()
    table: Table | None = None


def page(title: str, body: Iterable[str]) -> str:
    """The whole page, around the lines of its body."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *body,
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def as_image(figure: Figure) -> str:
    """The figure as the address of an SVG picture that is its own content."""
    buffer = io.BytesIO()
    # the same bytes each time
    with matplotlib.rc_context({"svg.hashsalt": "difficulty"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def facts_table(facts: Mapping[str, str]) -> Iterator[str]:
    rows = [(name, f"<code>{escape(value)}</code>") for name, value in facts.items()]
    yield '<div class="wide"><table>'
    yield from (f'<tr><th>{escape(k)}</th><td class="text">{v}</td></tr>' for k, v in rows)
    yield "</table></div>"


def section(content: Section) -> Iterator[str]:
    yield f'<section><h2>{escape(content.title)}</h2><div class="plots">'
    for plot in content.plots:
        alt = escape(plot.figure.axes[0].get_title() + ". " + plot.reading, quote=True)
        yield f'<figure><img alt="{alt}" src="{as_image(plot.figure)}">'
        yield f"<figcaption>{escape(plot.reading)}</figcaption></figure>"
    yield "</div>"
    if content.table is not None:
        yield from _table(content.table)
    yield "</section>"


def _table(table: Table) -> Iterator[str]:
    words = any(" " in cell for row in table.rows for cell in row[1:])
    yield f'<div class="wide"><table{" class=words" if words else ""}><thead><tr>'
    yield "".join(f"<th>{escape(name)}</th>" for name in table.header) + "</tr></thead><tbody>"
    for row in table.rows:
        # sentences may break, numbers may not
        cells = (
            f'<td class="text">{escape(x)}</td>' if " " in x else f"<td>{escape(x)}</td>"
            for x in row
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
