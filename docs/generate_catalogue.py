"""Writes docs/catalogue.md and docs/gallery from the registries.

    python -m docs.generate_catalogue [PICTURE ...]

The text is a function of the registries alone, and a test compares it with the files.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from diffusers_curriculum.catalogue import Entry
from diffusers_curriculum.densities import DENSITIES, SHIFT_PRESETS
from diffusers_curriculum.samplers import SAMPLERS
from diffusers_curriculum.weighting import WEIGHTINGS
from diffusers_curriculum.weighting.learned import LEARNED_WEIGHTINGS
from docs.gallery_pictures import density_picture, sampler_picture, weighting_picture

DOCS = Path(__file__).parent
GALLERY = DOCS / "gallery"
_EMPTY = inspect.Parameter.empty
# Settings that every sampler has, told once above the table.
COMMON = {"scheduler", "draw", "floor", "importance_correction", "outer_edges", "seed"}

HEAD = """<!-- Written by `python -m docs.generate_catalogue`; do not edit. -->

# Catalogue

Every law of noise levels, loss weighting and sampler that has a name, with its formula, defaults
and source. `l` is the log-SNR, natural logarithm, higher = cleaner; `S = exp(l)`; `t` the noise
fraction of flow matching and `tau` the fraction of the schedule's timesteps, both 0 = clean; `sig`
the logistic function. "Families" are the schedules that an entry is meant for: variance preserving
(`vp`), flow matching (`flow`), EDM (`edm`).

Each name leads to its picture in the [gallery](gallery/README.md). To see an entry on a schedule of
your own: `diffusers-curriculum preview SOURCE --timestep_sampler NAME`.
"""

KINDS = {
    "density": (
        "Densities",
        "Given to `DensityTimestepSampler(scheduler, density=NAME, density_args={...})` or to "
        "`--timestep_sampler NAME --timestep_sampler_args KEY=VALUE ...`. `p(l)` is per unit of "
        "log-SNR.",
    ),
    "weighting": (
        "Loss weightings",
        "Given to `loss_weights(NAME, levels, ...)` or to `--loss_weighting NAME "
        "--loss_weighting_args KEY=VALUE ...`. `W_x0`, `W_eps`, `W_v`, `W_flow` weight the squared "
        "error of that target; one implies the others. `uncertainty` is learned: its class is "
        "`LearnedLossWeights`, its flag the same.",
    ),
    "sampler": (
        "Samplers",
        "Classes with `from_scheduler(scheduler, ...)`. All of them take `draw`, `floor`, "
        "`importance_correction` and `seed`, except where they wrap others that do.",
    ),
}


def entries() -> Iterator[tuple[str, Entry]]:
    """(kind, entry) of everything that is registered, in the order of the registries."""
    yield from (("density", entry) for entry in DENSITIES.entries)
    yield from (("weighting", entry) for entry in WEIGHTINGS.entries)
    yield from (("weighting", entry) for entry in LEARNED_WEIGHTINGS.entries)
    yield from (("sampler", entry) for entry in SAMPLERS.entries)


def picture_name(kind: str, entry: Entry) -> str:
    """The file in docs/gallery that shows an entry."""
    return f"{kind}-{entry.name}.png"


def catalogue() -> str:
    """The text of docs/catalogue.md."""
    parts = [HEAD]
    for kind, (title, told) in KINDS.items():
        parts.append(f"\n## {title}\n\n{told}\n")
        parts.append("\n| name | formula | defaults | source | families | note |\n")
        parts.append("|---|---|---|---|---|---|\n")
        parts += [_row(kind, entry) for this, entry in entries() if this == kind]
    return "".join([*parts, *_presets()])


def _presets() -> Iterator[str]:
    """The shifts that families of models are trained with."""
    yield (
        "\n## Shift presets\n\nFor the density `shifted` and for `--timestep_shift_preset NAME "
        "--timestep_shift_tokens N`: the shift s of\ntraining, which is not always that of "
        "sampling, or mu = ln s at two numbers of image tokens, on a line that is not\nclamped. "
        "Tokens are counted after the network has joined values to patches: usually (height / 16) "
        "x\n(width / 16). Two trainers that disagree have a preset each. Ideogram4's law is "
        "`logit_normal std=1.5\npixels=N base_pixels=262144`.\n\n"
        "| name | s, or mu of tokens | terminal | source |\n|---|---|---|---|\n"
    )
    for name, preset in SHIFT_PRESETS.items():
        points = (f"{tokens:g}: {mu:g}" for tokens, mu in preset.line or ())
        told = ", ".join(points) if preset.line else f"{preset.shift:g}"
        yield f"| `{name}` | {told} | {preset.terminal or ''} | {preset.source} |\n"


def gallery() -> str:
    """The text of docs/gallery/README.md."""
    parts = [
        "<!-- Written by `python -m docs.generate_catalogue`; do not edit. -->\n\n# Gallery\n\n"
        "Every entry of the [catalogue](../catalogue.md) at its defaults, or at the arguments\n"
        "under its picture. Densities are drawn without a floor on a schedule that they are meant\n"
        "for (Stable Diffusion's, flow matching or EDM); dashed: uniform timesteps. Weights are\n"
        "relative to their largest on the schedule of DDPM. Samplers that learn are shown once\n"
        "they have seen the losses of a made-up linear model of data whose variances spread over\n"
        "four decades. A level at infinite log-SNR counts to the last bin.\n"
    ]
    for kind, (title, _) in KINDS.items():
        parts.append(f"\n## {title}\n")
        for this, entry in entries():
            if this == kind:
                picture = f"![{entry.name}]({picture_name(kind, entry)})"
                shown = f"\n\n`{json.dumps(e)}`" if (e := example(kind, entry)) else ""
                parts.append(
                    f'\n### <a id="{kind}-{entry.name}"></a>{entry.name}\n\n`{entry.formula}`\n\n'
                    f"{picture}{shown}\n"
                )
    return "".join(parts)


def example(kind: str, entry: Entry) -> dict[str, Any]:
    """Arguments of the instance that is drawn; empty for the defaults."""
    return dict(entry.example) if kind == "density" else {}


def defaults(kind: str, entry: Entry) -> str:
    """``name=value`` of each parameter; one that must be given is named alone."""
    pairs = _density_defaults(entry) if kind == "density" else _signature_defaults(kind, entry)
    given = [(name, value) for name, value in pairs if value is not None]
    told = [name if value is _EMPTY else f"{name}={_shown(value)}" for name, value in given]
    optional = ", ".join(name for name, value in pairs if value is None)
    return "; ".join(filter(None, (", ".join(told), optional and f"optional {optional}")))


def write(root: Path = DOCS, only: Iterable[str] | None = None) -> list[Path]:
    """Write both texts and the pictures (all, or ``only`` these files) below ``root``; pictures of
    entries that are gone go too."""
    folder = root / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "catalogue.md").write_text(catalogue(), "utf-8")
    (folder / "README.md").write_text(gallery(), "utf-8")
    wanted = {picture_name(kind, entry): (kind, entry) for kind, entry in entries()}
    for stale in folder.glob("*.png"):
        if stale.name not in wanted:
            stale.unlink()
    chosen = list(wanted) if only is None else list(only)
    return [_draw(folder / name, *wanted[name]) for name in chosen]


def _draw(path: Path, kind: str, entry: Entry) -> Path:
    draw: dict[str, Callable[..., Any]] = {
        "density": density_picture,
        "weighting": weighting_picture,
        "sampler": sampler_picture,
    }
    # 64 colours are enough for lines on white, and a quarter of the size
    draw[kind](entry, example(kind, entry)).quantize(64).save(path, optimize=True)
    return path


def _row(kind: str, entry: Entry) -> str:
    name = f"[`{entry.name}`](gallery/README.md#{kind}-{entry.name})"
    note = f"`{entry.make.__name__}`; {entry.note}" if kind == "sampler" else entry.note
    given = defaults(kind, entry)
    cells = [name, f"`{entry.formula}`", f"`{given}`" if given else "", entry.source]
    return "| " + " | ".join(_cell(c) for c in [*cells, entry.families, note]) + " |\n"


def _cell(text: str) -> str:
    # GitHub's tables read an escaped bar as a bar, in code too
    return text.replace("|", "\\|").replace("\n", " ").strip()


def _density_defaults(entry: Entry) -> list[tuple[str, Any]]:
    own = [f for f in dataclasses.fields(entry.make) if f.name != "edges"]  # type: ignore[arg-type]
    return [(f.name, _field_default(f)) for f in own]


def _field_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return _EMPTY if field.default is dataclasses.MISSING else field.default


def _signature_defaults(kind: str, entry: Entry) -> list[tuple[str, Any]]:
    parameters = inspect.signature(entry.make).parameters.values()
    own = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = [p for p in own if p.name not in COMMON] if kind == "sampler" else own[1:]
    return [(p.name, p.default) for p in own]


def _shown(value: Any) -> str:
    return f"{value:g}" if type(value) is float else str(value)


if __name__ == "__main__":
    sys.stdout.write("\n".join(str(path) for path in write(only=sys.argv[1:] or None)) + "\n")
