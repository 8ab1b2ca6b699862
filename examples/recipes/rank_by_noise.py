"""LoRA whose rank falls with the noise, as in T-LoRA (arXiv 2507.05964): one direction where all is
noise, and which an adapter fits to few images first; all of them at the cleanest level."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from with_peft import train

TIMESTEPS = 1000


class RankByNoise:
    """Tell it the timesteps before every forward pass, when pictures are drawn, too."""

    def __init__(self, model: Any) -> None:
        self.clean = torch.ones(1)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_A["default"].register_forward_hook(self._masked)

    def __call__(self, timesteps: Tensor) -> None:
        self.clean = 1 - timesteps / (TIMESTEPS - 1)  # (B,)

    def _masked(self, layer: Any, inputs: Any, down: Tensor) -> Tensor:
        """Of the middle of an update, (B, ..., rank), or (B, rank, ...) of a convolution."""
        rank, ones = len(layer.weight), (1,) * (down.ndim - 2)
        kept = 1 + ((rank - 1) * self.clean).round()
        mask = (torch.arange(rank, device=down.device) < kept[:, None]).to(down.dtype)
        shape = (rank, *ones) if isinstance(layer, torch.nn.Conv2d) else (*ones, rank)
        return down * mask.reshape(-1, *shape)


if __name__ == "__main__":
    losses = train(steps=60, prepare=RankByNoise)
    print(f"first ten steps {sum(losses[:10]) / 10:.3f}, last ten {sum(losses[-10:]) / 10:.3f}")
