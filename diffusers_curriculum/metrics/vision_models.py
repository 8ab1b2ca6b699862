"""Features of transformers' vision models, saved with save_pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from diffusers_curriculum.metrics.preprocessing import (
    FeatureNetworkError,
    Preprocessing,
    read_preprocessing,
)
from diffusers_curriculum.models.loading import load_whole

PREPROCESSOR = "preprocessor_config.json"
_EXAMPLE = (
    '{"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5], '
    '"image_std": [0.5, 0.5, 0.5]}'
)


class VisionFeatures(nn.Module):
    """A vision model behind its preprocessing; (B, 3, H, W) images to (B, D) features.

    A classifier gives what its last linear layer is fed with. Another model gives its pooled
    output; where it has none, the first token (CLS) of its last hidden state, or the mean over a
    feature map.

    Args:
        pooled: whether to trust the pooled output; False where its weights were not saved.

    Raises:
        FeatureNetworkError: a classifier whose last layer is not found.
    """

    def __init__(self, network: Any, preprocessing: Preprocessing, pooled: bool = True) -> None:
        super().__init__()
        self.network, self.preprocessing, self.pooled = network, preprocessing, pooled
        if is_classifier(network.config):
            _cut_head(network)

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(pixel_values=self.preprocessing(images))
        if "logits" in output:
            return output.logits.flatten(1)
        features = output.get("pooler_output") if self.pooled else None
        if features is not None:
            return features.flatten(1)
        hidden = output.last_hidden_state
        return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0]


def is_classifier(config: Any) -> bool:
    """Whether a transformers configuration says that the saved model classifies images."""
    return any("ForImageClassification" in name for name in config.architectures or ())


def _cut_head(network: Any) -> None:
    labels = network.config.num_labels
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    heads = [name for name, layer in layers.items() if layer.out_features == labels]
    if not heads:
        raise FeatureNetworkError(
            f"{type(network).__name__} has no linear layer with {labels} outputs, whose input "
            "would be the features: give another network as --eval_feature_model."
        )
    network.set_submodule(heads[-1], nn.Identity())


def load_vision_model(name: str, preprocessing: Preprocessing | None = None) -> VisionFeatures:
    """Load a model, safetensors only and no code, from a folder or a repository on the Hub, and its
    preprocessing from its preprocessor_config.json if none is given.

    A FeatureNetworkError says what is missing, and the remedy.
    """
    folder = local_folder(name)
    source = name if folder is None else str(folder)
    try:
        network, missing = _load(source)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FeatureNetworkError(
            f"the feature network {name} cannot be loaded ({first_line(error)}). Give the name of "
            "a transformers vision model with safetensors weights, or download it where there is a "
            "network and give its folder as --eval_feature_model."
        ) from error
    if preprocessing is None:
        preprocessing = find_preprocessing(name, folder, network.config)
    return VisionFeatures(network, preprocessing, pooled=not missing)


def _load(source: str) -> tuple[Any, set[str]]:
    """The model and the names of the weights of its pooler, if they were not saved."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if hasattr(config, "text_config"):
        raise ValueError(f"{config.model_type} wants texts too; save its vision model alone")
    kind = AutoModelForImageClassification if is_classifier(config) else AutoModel
    network, missing = load_whole(kind, source, may_lack=("pooler.",), trust_remote_code=False)
    return network.float(), missing


def local_folder(name: str) -> Path | None:
    """The folder of a model, None for the name of a repository; a FeatureNetworkError says that
    there is no such folder, or that it has no safetensors."""
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith(("/", "./", "../", "~")):
            raise FeatureNetworkError(
                f"the feature network {name}: there is no such folder. Give one that "
                "save_pretrained wrote, or the name of a repository on the Hub."
            )
        return None
    if not any(path.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise FeatureNetworkError(
            f"the feature network {name} has no safetensors weights (found: {found}), and pickles "
            "are not read: save it again with save_pretrained."
        )
    return path


def find_preprocessing(name: str, folder: Path | None, config: Any) -> Preprocessing:
    """Read the preprocessing of a model with a configuration, from its folder or from the Hub."""
    try:
        path = folder / PREPROCESSOR if folder else Path(hf_hub_download(name, PREPROCESSOR))
    except (OSError, ValueError):  # the Hub's errors are of both kinds
        path = None
    if path is None or not path.is_file():
        raise FeatureNetworkError(
            f"the feature network {name} has no {PREPROCESSOR}, which says how to resize and "
            f"normalise images for it: put one there, such as {_EXAMPLE}."
        )
    return read_preprocessing(path, getattr(config, "num_channels", 3))


def first_line(error: Exception) -> str:
    """What an error says first, without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
