"""What both scripts of a pair are given: the same model, images and flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers_curriculum.models.tiny import make_tiny_pipeline

ROOT = Path(__file__).parents[2]
RESOLUTION = 32
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": RESOLUTION,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
LONG = 10**6  # steps: the run is ended long before


class Failed(RuntimeError):
    """A script did not come to its last step."""


@dataclass(frozen=True)
class Pair:
    """A script here, the one of diffusers that it stands beside, and the flags of each.

    Attributes:
        here, official: files below the project and below diffusers' examples.
        flags: of both.
        only_here, only_official: of one of them.
    """

    here: str
    official: str
    flags: tuple[str, ...]
    only_here: tuple[str, ...] = ()
    only_official: tuple[str, ...] = ()


_COMMON = (
    *("--resolution", str(RESOLUTION), "--learning_rate", "1e-4"),
    *("--checkpointing_steps", str(LONG), "--random_flip", "--use_ema"),
)
_PIXELS = ("--train_data_dir", "{images}", *_COMMON)
_EPOCHS = ("--num_epochs", "--save_images_epochs", "--save_model_epochs")
_UNCONDITIONAL = "unconditional_image_generation/train_unconditional.py"
_OFFICIAL_UNET = (
    *("--model_config_name_or_path", "{unet}"),
    *(word for name in _EPOCHS for word in (name, str(LONG))),
)
_STEPS = ("--max_train_steps", str(LONG))
PAIRS = {
    "text_to_image": Pair(
        "train_text_to_image_curriculum.py",
        "text_to_image/train_text_to_image.py",
        (
            *("--pretrained_model_name_or_path", "{pipeline}", "--train_data_dir", "{captions}"),
            *(*_COMMON, *_STEPS, "--seed", "0"),
        ),
    ),
    "unconditional": Pair(
        "examples/unconditional/train_unconditional_curriculum.py",
        _UNCONDITIONAL,
        _PIXELS,
        only_here=("--model_config_name_or_path", "{unet}", *_STEPS),
        only_official=_OFFICIAL_UNET,
    ),
    "class_conditional": Pair(
        "examples/class_conditional/train_class_conditional_curriculum.py",
        _UNCONDITIONAL,
        _PIXELS,
        only_here=("--model_config", "{classes}", *_STEPS),
        only_official=_OFFICIAL_UNET,
    ),
}


class Bed:
    """A folder with the models and images, in which scripts are run and timed.

    Args:
        official: a checkout of diffusers.
        threads: of torch, in each run.
        here: more flags of the scripts here.
    """

    def __init__(self, root: Path, official: Path, threads: int, here: Sequence[str] = ()) -> None:
        self.root, self.official, self.threads, self.here = root, official, threads, [*here]
        self.places = {
            "captions": root / "captions",
            "images": root / "images",
            "pipeline": root / "pipeline",
            "unet": root / "unet",
            "classes": root / "classes",
        }
        self.runs = 0

    def make(self) -> None:
        """Write the scans of digits, a tiny Stable Diffusion, and the configs of two U-Nets."""
        sys.path.insert(0, str(ROOT / "examples" / "text_to_image"))
        digits = import_module("digits")
        digits.export(self.places["captions"], RESOLUTION)
        digits.export_by_class(self.places["images"], RESOLUTION)
        make_tiny_pipeline(self.places["captions"], self.places["pipeline"], vae_steps=1)
        for name, config in (("unet", UNET), ("classes", UNET | {"num_class_embeds": 11})):
            self.places[name].mkdir()
            (self.places[name] / "config.json").write_text(json.dumps(config))

    def run(self, pair: Pair, official: bool, batch: int, steps: int, **extra: str) -> Any:
        """The notes of one run; see :class:`timed.Notes`.

        Raises:
            Failed: with the end of what it wrote.
        """
        self.runs += 1
        notes = self.root / f"{self.runs}.json"
        own = pair.only_official if official else pair.only_here
        script = self.official / "examples" / pair.official if official else ROOT / pair.here
        words = (*pair.flags, *own, "--train_batch_size", str(batch))
        argv = [word.format_map(self.places) for word in words]
        argv += ["--output_dir", str(self.root / f"out-{self.runs}"), "--cache_dir", str(self.root)]
        argv += [] if official else self.here
        timed = [sys.executable, "-m", "benchmarks.against_diffusers.timed", str(notes)]
        command = [*timed, repr(time.time()), str(steps), str(script), *argv]
        done = subprocess.run(
            command, cwd=ROOT, env=self._surroundings() | extra, capture_output=True, text=True
        )
        if not notes.is_file():
            raise Failed(f"{script.name} ended with {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(notes.read_text("utf-8"))

    def _surroundings(self) -> dict[str, str]:
        threads = {f"{name}_NUM_THREADS": str(self.threads) for name in ("OMP", "MKL")}
        return {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
