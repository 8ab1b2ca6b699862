"""Networks that are told two times: where an interval ends, and how long it is."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class TwoTimesProjection(Timesteps):
    """Sines and cosines of a time and of a length, both (B,): (2, B, C) of (2, B), or of times
    (B,), which are intervals of no length."""

    def __init__(self, single: Any) -> None:
        kept = ("num_channels", "flip_sin_to_cos", "downscale_freq_shift", "scale")
        super().__init__(**{name: getattr(single, name) for name in kept})

    def forward(self, timesteps: Tensor) -> Tensor:
        alone = timesteps.ndim == 1
        both = (timesteps, torch.zeros_like(timesteps)) if alone else timesteps
        return torch.stack([super(TwoTimesProjection, self).forward(each) for each in both])


class TwoTimesEmbedding(TimestepEmbedding):
    """The embedding (B, D) of a time, plus that of a length, of projections (2, B, C). The second
    begins as zero: a network that knew one time goes on as it was."""

    def __init__(self, single: Any) -> None:
        inputs, width = single.linear_1.in_features, single.linear_1.out_features
        super().__init__(inputs, width)
        self.length = TimestepEmbedding(inputs, width)
        nn.init.zeros_(self.length.linear_2.weight)
        nn.init.zeros_(self.length.linear_2.bias)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(sample[0], condition) + self.length(sample[1])


class TwoTimes(ModelMixin):
    """What such networks are known by, in whatever module their class is loaded."""

    two_times = True


class TwoTimesUNet2DModel(TwoTimes, UNet2DModel):
    """A UNet2DModel whose ``timestep`` is (2, B): where an interval ends, and its length; or (B,)
    for intervals of no length."""

    @wraps(UNet2DModel.__init__)
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        self.time_proj = TwoTimesProjection(self.time_proj)
        self.time_embedding = TwoTimesEmbedding(self.time_embedding)


class TwoTimesDiTTransformer2DModel(TwoTimes, DiTTransformer2DModel):
    """A DiTTransformer2DModel whose ``timestep`` is (2, B): where an interval ends, and its length;
    or (B,) for intervals of no length."""

    @wraps(DiTTransformer2DModel.__init__)
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        blocks: Any = self.transformer_blocks
        for told in (block.norm1.emb for block in blocks):
            told.time_proj = TwoTimesProjection(told.time_proj)
            told.timestep_embedder = TwoTimesEmbedding(told.timestep_embedder)


TWO_TIMES = {UNet2DModel: TwoTimesUNet2DModel, DiTTransformer2DModel: TwoTimesDiTTransformer2DModel}


def with_two_times(network: Any) -> Any:
    """A network that is told two times, with the weights of ``network`` and the same outputs for
    intervals of any length; ``network`` itself if it is told two already.

    Raises:
        ValueError: its times are no sines and cosines (``time_embedding_type``).
    """
    kind = TWO_TIMES.get(type(network))
    if kind is None:
        return network
    embedding = network.config.get("time_embedding_type", "positional")
    if embedding != "positional":
        raise ValueError(
            f"time_embedding_type={embedding!r} has no second time: build the UNet2DModel with "
            "time_embedding_type='positional'."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = {name: value for name, value in network.config.items() if name[0] != "_"}
        told = kind(**config)
    told.load_state_dict(network.state_dict(), strict=False)
    return told
