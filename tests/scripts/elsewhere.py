"""A process with diffusers and without this package, which draws what a run has left."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PROMPT, SEED, STEPS = "picture number 1", 7, 2


def drawn(pipeline: Any, side: int) -> Any:
    """A picture (1, 3, side, side) in [0, 1] of a few steps from the noise of a seed."""
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": side, "width": side, "num_inference_steps": STEPS}
    noise = torch.Generator().manual_seed(SEED)
    return pipeline(prompt=PROMPT, generator=noise, output_type="pt", **size).images


_PROGRAM = f"""
import json, sys
sys.modules["diffusers_curriculum"] = None  # importing it fails
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from typing import Any
torch.set_num_threads(1)
PROMPT, SEED, STEPS = {PROMPT!r}, {SEED}, {STEPS}
{inspect.getsource(drawn)}
for line in sys.stdin:
    told = json.loads(line)
    pipeline = DiffusionPipeline.from_pretrained(told["pipeline"])
    if told["adapter"]:
        pipeline.load_lora_weights(told["adapter"], weight_name="pytorch_lora_weights.safetensors")
    save_file({{"picture": drawn(pipeline, told["side"])}}, told["file"])
    print("drawn by", type(pipeline).__name__, flush=True)
"""


class Elsewhere:
    """The process, which serves many tests, as its imports take seconds; ``folder`` holds what it
    writes."""

    def __init__(self, folder: Path) -> None:
        self.file, self.errors = folder / "picture.safetensors", folder / "errors.txt"
        hidden = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM],
                cwd=folder,
                env=hidden,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def drawn(self, pipeline: Path, side: int, adapter: Path | None = None) -> tuple[str, Tensor]:
        """Class and picture of the pipeline in a folder, with an adapter from another if given."""
        stdin, stdout = self.process.stdin, self.process.stdout
        told = {"pipeline": str(pipeline), "side": side, "file": str(self.file)}
        print(json.dumps(told | {"adapter": adapter and str(adapter)}), file=stdin, flush=True)
        for line in stdout or ():
            if line.startswith("drawn by "):
                # a copy, as the file is written again
                return line.split()[-1], load_file(self.file)["picture"].clone()
        raise RuntimeError(self.errors.read_text())

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)
