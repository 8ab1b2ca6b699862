"""The networks of class-conditional and unconditional training, and their labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusers_curriculum.models.loading import load_model, read_config
from diffusers_curriculum.models.network_config import Asked, complete_config, network_class


def build_network(
    model_config: str,
    *,
    channels: int,
    out_channels: int | None = None,
    sample_size: int,
    num_classes: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Any:
    """Build a network with first weights from its name or config; label dropout inside is off.

    A DiT starts as in arXiv 2212.09748 (:func:`initialise_dit`) and has 1,000 label rows and the
    null row, or more for more classes: DiTPipeline takes class 1000 as the null class. Without
    classes it has the null row only. A UNet2DModel has one row per class and the null row; without
    classes it takes no labels.

    Args:
        model_config: "DiT-S/2" (S, B, L, XL and a patch size), "UNet" (that of diffusers'
            train_unconditional.py), or a JSON file, a folder with config.json or a Hub id of a
            DiTTransformer2DModel or a UNet2DModel (the latter also without `_class_name`). What
            such a config leaves out is filled in.
        channels, out_channels: of the noisy input, and as many or, with a learned variance, twice
            as many of the output; None: as the config says, else `channels`.
        sample_size: height and width of the input.
        num_classes: None for a network without labels.
        seed: of the first weights; the global generators are left as they were.

    Raises:
        ValueError: unknown names, a config that contradicts the arguments, sizes that do not fit.
    """
    asked = Asked(channels, out_channels, sample_size, num_classes)
    kind, config = complete_config(model_config, asked, revision, subfolder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = kind(**config)
        if kind.__name__.endswith("DiTTransformer2DModel"):
            initialise_dit(network)
    return without_label_dropout(network)


def load_network(
    path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a trained DiTTransformer2DModel or UNet2DModel; label dropout inside is off. A
    ValueError says that it is of another class, has no safetensors weights, or is not there."""
    kind = network_class(read_config(path, revision, subfolder), path)
    return without_label_dropout(load_model(kind, path, revision, variant, subfolder, dtype))


def empty_network(path: str, revision: str | None = None, subfolder: str | None = None) -> Any:
    """Like :func:`load_network`, but without the weights, for the config alone."""
    config = read_config(path, revision, subfolder)
    with torch.device("meta"):
        return network_class(config, path).from_config(config)


def initialise_dit(network: Any) -> None:
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
    for block in network.transformer_blocks:
        embedder = block.norm1.emb.timestep_embedder
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(network.proj_out_1.weight)
    nn.init.zeros_(network.proj_out_2.weight)


def _xavier(layer: Any) -> None:
    """Xavier-uniform on the weight as a matrix, zero bias."""
    nn.init.xavier_uniform_(layer.weight.detach().flatten(1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def without_label_dropout(network: Any) -> Any:
    """Switch the label dropout inside `network` off, in place, and return the network.

    diffusers' DiT draws it anew in every block and from the global generator, so that a sample is
    hardly ever without a label throughout; give it :func:`null_class` as the label instead. The
    null class keeps its row.
    """
    from diffusers.models.embeddings import LabelEmbedding  # here, as it takes seconds

    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return network


def takes_labels(network: Any) -> bool:
    """Whether `network` must be given class labels."""
    config = network.config
    return "num_embeds_ada_norm" in config or config.get("num_class_embeds") is not None


def num_classes(network: Any) -> int:
    """How many classes `network` knows, the null class not counted."""
    config = network.config
    if "num_embeds_ada_norm" in config:
        return int(config["num_embeds_ada_norm"])
    return max(0, int(config.get("num_class_embeds") or 0) - 1)


def null_class(network: Any) -> int:
    """The label that stands for no label: the one after all classes; a ValueError says that the
    network takes none."""
    if not takes_labels(network):
        raise ValueError(
            f"this {type(network).__name__} takes no labels and so has no null class: build it "
            "with num_classes."
        )
    return num_classes(network)


def learns_variance(network: Any) -> bool:
    """Whether `network` gives a variance besides its prediction: twice as many channels."""
    return network.config.get("out_channels") == 2 * network.config["in_channels"]


def check_conditioning(network: Any, timesteps: Tensor) -> None:
    """Raise ValueError where the network's embedding of time cannot take these timesteps.

    A "fourier" embedding takes their logarithm, which EDM's c_noise (it is negative) and timestep
    0 do not have; a "learned" one looks them up by whole numbers.
    """
    kind = network.config.get("time_embedding_type", "positional")
    lowest, highest = float(timesteps.min()), float(timesteps.max())
    if kind == "fourier" and lowest <= 0:
        raise ValueError(
            f"time_embedding_type='fourier' takes the logarithm of timesteps, which are as low as "
            f"{lowest:g} here: build the UNet2DModel with time_embedding_type='positional'."
        )
    rows = int(network.config.get("num_train_timesteps") or 0) if kind == "learned" else 0
    whole = not timesteps.is_floating_point()
    if kind == "learned" and not (whole and lowest >= 0 and highest < rows):
        raise ValueError(
            f"time_embedding_type='learned' takes whole timesteps from 0 to {rows - 1}, not "
            f"{timesteps.dtype} ones from {lowest:g} to {highest:g}: build the UNet2DModel with "
            "time_embedding_type='positional'."
        )
