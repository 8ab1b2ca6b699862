"""One of several processes: make the runs of a JSON file, and write what this rank saw.

    torchrun --nproc_per_node 2 -m tests.scripts.process_driver runs.json

The file holds a list of {"name", "argv", "skew"}; next to it goes <name>.rank<R>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator

from tests.scripts.small_runs import train
from tests.scripts.witness import one_thread, witnessed


def main() -> None:
    """Make all runs in one process group: starting a process takes longer than a run."""
    one_thread()
    Accelerator.end_training = Accelerator.wait_for_everyone  # keep the group for the next run
    plans = Path(sys.argv[1])
    for plan in json.loads(plans.read_text()):
        with witnessed(plan["skew"]) as told:
            train(plan["argv"])
        path = plans.with_name(f"{plan['name']}.rank{os.environ['RANK']}.json")
        path.write_text(json.dumps(told.__dict__))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
