"""How many captions a second the text encoders of each family encode, one or several at once.

    python -m benchmarks.captions [--captions 32] [--at_once 1 4 16] [--repeats 3] [--json PATH]

Encoders have random weights, a few layers and 256 numbers a token; captions have up to 20 words,
and each family makes of them as many tokens as it does in training. By processor time, medians of
repeats in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import ModelFamily, families
from diffusers_curriculum.training.parts.families.flow import FlowFamily

WIDTH, LAYERS, HEADS = 256, 4, 4
SECTIONS = [8, 12, 12]  # of a head's numbers by which a position in text and image is told


def widened(encoder: Any) -> Any:
    """The same kind of encoder, with more to do for a token."""
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    text = getattr(config, "text_config", config)
    if hasattr(text, "d_model"):  # a T5
        text.update({"d_model": WIDTH, "d_ff": 2 * WIDTH, "num_layers": LAYERS, "num_heads": HEADS})
        text.d_kv = WIDTH // HEADS
        return type(encoder)(config).eval()
    layers = max(LAYERS, text.num_hidden_layers)
    text.update({"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": layers})
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS}
    text.update({name: value for name, value in heads.items() if hasattr(text, name)})
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * layers
    for name in ("rope_parameters", "rope_scaling"):
        if "mrope_section" in (getattr(text, name, None) or {}):
            getattr(text, name)["mrope_section"] = SECTIONS
    return type(encoder)(config).eval()


def models_of(family: ModelFamily) -> Components:
    """The text encoders and tokenizers of a family."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = family.tiny()
        encoders: dict[str, nn.Module] = {name: widened(parts[name]) for name in family.encoders}
    told = {name: parts[name] for name in family.settings if name in parts}
    base: Any = SimpleNamespace(settings=lambda names: told)
    return Components(None, None, encoders, {name: parts[name] for name in family.tokenizers}, base)


@torch.no_grad()
def rates(
    family: FlowFamily, captions: Sequence[str], at_once: Sequence[int], repeats: int
) -> dict[int, float]:
    """Captions in a second of the processor, by how many are encoded at once."""
    models = models_of(family)
    found: dict[int, list[float]] = {size: [] for size in at_once}
    for _ in range(repeats):
        for size, seen in found.items():
            start = time.process_time()
            for first in range(0, len(captions), size):
                some = captions[first : first + size]
                family.encode_text(models, family.tokenize(models.tokenizers, some))
            seen.append(len(captions) / (time.process_time() - start))
    return {size: statistics.median(seen) for size, seen in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each family; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.captions")
    parser.add_argument("--captions", type=int, default=32, help="default %(default)s")
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=3, help="default %(default)s")
    parser.add_argument("--families", nargs="+", help="default: all of flow matching")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args(argv)
    captions = [f"painting {n} of" + " a red fox" * (n % 7) for n in range(args.captions)]
    figures = {}
    for name, family in families().items():
        if not isinstance(family, FlowFamily) or name not in (args.families or families()):
            continue
        found = figures[name] = rates(family, captions, args.at_once, args.repeats)
        first = next(iter(found.values()))
        told = ", ".join(
            f"{size}: {rate:.1f} ({rate / first:.2f}x)" for size, rate in found.items()
        )
        print(f"{name}, captions a second by how many at once: {told}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
