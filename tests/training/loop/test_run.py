"""What a step works with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from diffusers_curriculum import Slots
from diffusers_curriculum.randomness import key
from diffusers_curriculum.training.loop.run import Run


def test_a_model_draws_as_after_a_manual_seed() -> None:
    unused = dict.fromkeys(("args", "network", "averages", "optimizer", "guard", "lr_scheduler"))
    here: Any = SimpleNamespace(device=torch.device("cpu"))
    run = Run(**unused, accelerator=here, seed=5)  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(5, 7, 4, purpose="model") >> 65)
        expected = torch.rand(3)
        run.seed_model(7, Slots(4, 2, 8))
        assert torch.equal(torch.rand(3), expected)
        run.seed_model(8, Slots(4, 2, 8))
        assert not torch.equal(torch.rand(3), expected)
