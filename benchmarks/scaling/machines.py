"""What a run on many processes sends, holds and saves: arithmetic, but for the speed of a save.

    python -m benchmarks.scaling.machines [--ranks 8 64 1024] [--batch 32] [--image_kb 150]
                                          [--images_per_second 10] [--megabytes 256] [--json PATH]

Networks are built without weights, of the sizes that they are published in. A checkpoint of
``--megabytes`` is saved as a run saves it, hashed and synced, for the rate of larger ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from benchmarks.gpu.larger import SDXL
from benchmarks.scaling.ranks import measure_ranks
from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint
from diffusers_curriculum.training.storage.tensors import save_tensors

GB, FLOAT = 10**9, 4
NETWORKS: dict[str, Callable[[], Any]] = {
    "Stable Diffusion 1.5": partial(
        UNet2DConditionModel, cross_attention_dim=768, attention_head_dim=8
    ),
    "Stable Diffusion XL": partial(UNet2DConditionModel, **SDXL),
    "Flux.1": FluxTransformer2DModel,
}
HELD = 5  # numbers for each parameter: weight, gradient, two moments, average
SAVED = 4  # all but the gradient
OBSERVED = 8 + 4  # bytes of a sample's level and loss
OF_A_RANK = 4 + 2 * 4  # of its own loss, and of what was not finite


def parameters(build: Callable[[], Any]) -> int:
    """How many numbers a network learns."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def held(count: int, ranks: int) -> float:
    """GB on each process, in float32, where all of it lies in shards."""
    return HELD * FLOAT * count / ranks / GB


def sent(count: int, ranks: int, passes: int) -> float:
    """GB that each process sends in a step: a ring passes on all but its own part, twice for a sum
    that all get (DDP), three times for two gatherings of weights and one sum of parts (FSDP2)."""
    return passes * FLOAT * count * (ranks - 1) / ranks / GB


def observed(batch: int, ranks: int) -> int:
    """Bytes that each process gets in a step for curricula, laws that learn, and the guard."""
    return ranks * (batch * OBSERVED + OF_A_RANK)


def save_rate(megabytes: int) -> float:
    """GB/s of a checkpoint: written, hashed, synced and renamed."""
    tensors = {"weights": torch.rand(megabytes * 10**6 // FLOAT)}

    def write(folder: Path) -> None:
        save_tensors(folder / "weights.safetensors", tensors)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        save_checkpoint(folder, 1, write, {})
        return megabytes * 10**6 / GB / (time.perf_counter() - start)


def figures(args: argparse.Namespace) -> dict[str, Any]:
    """All that is told."""
    rate, found = save_rate(args.megabytes), {}
    for name, build in NETWORKS.items():
        count = parameters(build)
        found[name] = {
            "parameters": count,
            "held": {n: held(count, n) for n in (1, *args.ranks)},
            "sent, DDP": {n: sent(count, n, 2) for n in args.ranks},
            "sent, FSDP2": {n: sent(count, n, 3) for n in args.ranks},
            "checkpoint": SAVED * FLOAT * count / GB,
            "seconds": SAVED * FLOAT * count / GB / rate,
        }
    streamed = args.images_per_second * args.image_kb * 1000 / GB
    return {
        "networks": found,
        "observed": {n: observed(args.batch, n) for n in args.ranks},
        "images": {n: n * streamed for n in args.ranks},
        "draws agree": measure_ranks(args.ranks, repeats=1, blocks=1)[1],
        "save rate": rate,
    }


def table(told: dict[str, Any], ranks: Sequence[int]) -> str:
    """The figures in Markdown."""
    heads = [f"held on {n:,}" for n in (1, *ranks)]
    heads += [f"sent by DDP, FSDP2 on {n:,}" for n in ranks]
    lines = [f"| network | parameters | {' | '.join(heads)} | checkpoint |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for name, of in told["networks"].items():
        cells = [f"{of['held'][n]:.3g} GB" for n in (1, *ranks)]
        cells += [f"{of['sent, DDP'][n]:.3g}, {of['sent, FSDP2'][n]:.3g} GB" for n in ranks]
        cells.append(f"{of['checkpoint']:.3g} GB, {of['seconds']:.0f} s")
        lines.append(f"| {name} | {of['parameters'] / 1e6:,.0f} M | {' | '.join(cells)} |")
    lines += ["", "| ranks | observed | images | draws of all, each once, are those of one |"]
    lines.append("|---|---|---|---|")
    for n in ranks:
        agree = "yes" if told["draws agree"][str(n)] else "NO"
        shown = f"{told['observed'][n] / 1000:,.1f} kB | {told['images'][n]:.3g} GB/s"
        lines.append(f"| {n:,} | {shown} | {agree} |")
    return "\n".join([*lines, "", f"saved at {told['save rate']:.2f} GB/s"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.machines")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 1024])
    parser.add_argument("--batch", type=int, default=32, help="samples of each process")
    parser.add_argument("--image_kb", type=float, default=150, help="size of an image's file")
    parser.add_argument("--images_per_second", type=float, default=10, help="of each process")
    parser.add_argument(
        "--megabytes", type=int, default=256, help="of the checkpoint that is timed"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    told = figures(args)
    print(table(told, args.ranks))
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return int(not all(told["draws agree"].values()))


if __name__ == "__main__":
    sys.exit(main())
