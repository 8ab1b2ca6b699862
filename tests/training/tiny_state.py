"""A tiny UNet in training, with everything that a checkpoint holds, for the tests of it."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffusers_curriculum.training.checkpoint.state import TrainingState


class Sampler:
    """State of the kinds that samplers have: tensors, plain numbers, an infinity."""

    def __init__(self, clusters: int = 5) -> None:
        self.state: dict[str, Any] = {
            "losses": torch.zeros(clusters, dtype=torch.float64),
            "counts": torch.zeros(clusters, dtype=torch.int64),
            "stage": torch.tensor(1),
            "best": math.inf,
            "calls": 0,
        }

    def observe(self, loss: float) -> None:
        state = self.state
        state["losses"][state["calls"] % len(state["losses"])] += loss
        state["counts"] += 1
        state["stage"] = state["stage"] + int(loss < state["best"])
        state["best"] = min(state["best"], loss)
        state["calls"] += 1

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def upgraded(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        if state_dict["calls"] < 0:
            raise ValueError("calls is negative")
        self.state = dict(state_dict)


def make_unet(seed: int, cross_attention_dim: int = 8) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            block_out_channels=(4, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=2,
            attention_head_dim=2,
            cross_attention_dim=cross_attention_dim,
        )


def make_state(seed: int = 0, *, ema: bool = True, unet: Any = None, **parts: Any) -> TrainingState:
    """A run before its first step; another seed gives other weights."""
    unet = unet or make_unet(seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=20)
    average = EMAModel(
        unet.parameters(), decay=0.97, model_cls=type(unet), model_config=unet.config
    )
    parts = {"trackers": {"mean": Sampler()}} | parts
    return TrainingState(unet, optimizer, schedule, Sampler(), average if ema else None, **parts)


def train(state: TrainingState, start: int, stop: int) -> list[str]:
    """Real optimizer steps; the losses, to the bit."""
    return [_train_step(state, step).hex() for step in range(start, stop)]


def _train_step(state: TrainingState, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    x, target = torch.randn((2, 2, 2, 8, 8), generator=generator)
    context = torch.randn((2, 3, 8), generator=generator)
    t = torch.randint(0, 1000, (2,), generator=generator)
    loss = (state.model(x, t, context).sample - target).square().mean()
    loss.backward()
    state.optimizer.step()
    state.lr_scheduler.step()
    state.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.step(state.model.parameters())
    for part in (state.sampler, *state.trackers.values()):
        if isinstance(part, Sampler):
            part.observe(loss.item())
    return loss.item()


def bits(state: TrainingState) -> dict[str, Any]:
    """Everything that must be equal for two runs to be the same from here on."""
    ema = vars(state.ema) if state.ema is not None else {}
    return {
        "unet": value_bits(state.model.state_dict()),
        "optimizer": value_bits(state.optimizer.state_dict()),
        "lr_scheduler": value_bits(state.lr_scheduler.state_dict()),
        "sampler": value_bits(state.sampler.state_dict()),
        "trackers": [value_bits(t.state_dict()) for t in state.trackers.values()],
        "scaler": value_bits(state.scaler.state_dict()) if state.scaler is not None else None,
        "ema": value_bits({k: v for k, v in ema.items() if k not in ("model_cls", "model_config")}),
    }


def value_bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(data).hexdigest()
        return (str(value.dtype), str(value.device), tuple(value.shape), digest)
    if isinstance(value, dict):
        return {key: value_bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(value_bits(item) for item in value)
    return value.hex() if isinstance(value, float) else value
