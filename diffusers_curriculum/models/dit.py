"""DiT (arXiv 2212.09748): its sizes by name, and its initialisation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


class DiTSize(NamedTuple):
    """Depth, width and attention heads of one row of table 1."""

    layers: int
    width: int
    heads: int


DIT_SIZES: Mapping[str, DiTSize] = {
    "S": DiTSize(12, 384, 6),
    "B": DiTSize(12, 768, 12),
    "L": DiTSize(24, 1024, 16),
    "XL": DiTSize(28, 1152, 16),
}
_NAME = re.compile(r"DiT-(\w+)/(\d+)")


def dit_config(name: str) -> dict[str, Any] | None:
    """Return the config of "DiT-<S, B, L or XL>/<patch size>", None for a name of another form.

    Raises:
        ValueError: a size that arXiv 2212.09748 does not have, a patch size of 0.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    size, patch = DIT_SIZES.get(match[1]), int(match[2])
    if size is None or patch < 1:
        raise ValueError(
            f"{name!r} is no DiT: its size is one of {', '.join(DIT_SIZES)} and its patch size 1 "
            "or more, as in DiT-B/2."
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": size.layers,
        "num_attention_heads": size.heads,
        "attention_head_dim": size.width // size.heads,
        "patch_size": patch,
    }


def initialise_dit(network: DiTTransformer2DModel) -> None:
    """Give a DiT the first weights of arXiv 2212.09748, drawn from the global generator.

    Linear layers and the patch embedding are Xavier-uniform with zero biases, the embeddings of
    label and timestep N(0, 0.02^2), all modulations and the output layer zero: every block starts
    as the identity, the whole network as zero. Call it inside `torch.random.fork_rng`.
    """
    from diffusers.models.embeddings import LabelEmbedding, PatchEmbed  # here, as it takes seconds

    for module in network.modules():
        if isinstance(module, nn.Linear):
            _xavier(module)
        elif isinstance(module, PatchEmbed):
            _xavier(module.proj)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
    parts: Any = network
    for block in parts.transformer_blocks:
        embedder = block.norm1.emb.timestep_embedder
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(parts.proj_out_1.weight)
    nn.init.zeros_(parts.proj_out_2.weight)


def _xavier(layer: Any) -> None:
    """Xavier-uniform on the weight as a matrix, zero bias."""
    nn.init.xavier_uniform_(layer.weight.detach().flatten(1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
