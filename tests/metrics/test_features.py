"""Features of tiny transformers models against what the models themselves compute."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusers_curriculum.metrics.features import FeatureNetwork, eight_bit, load_feature_network
from diffusers_curriculum.metrics.preprocessing import FeatureNetworkError
from tests.metrics.tiny_networks import PREPROCESSOR, save

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
FED = (eight_bit(IMAGES).float() / 255 - 0.5) / 0.5

# Kind of model -> the features as its own documentation names them, from the model itself.
FEATURES: dict[str, tuple[int, Callable[[Any], Tensor]]] = {
    "resnet": (20, lambda m: m.resnet(FED).pooler_output.flatten(1)),
    "vit": (24, lambda m: m.vit(FED).last_hidden_state[:, 0]),
    "vit_pooled": (24, lambda m: m(FED).pooler_output),
    "vit_bare": (24, lambda m: m(FED).last_hidden_state[:, 0]),
    "dinov2": (24, lambda m: m(FED).last_hidden_state[:, 0]),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_features_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    dim, features = FEATURES[kind]
    model = save(kind, tmp_path)
    network = load_feature_network(str(tmp_path))
    with torch.no_grad():
        expected = features(model)
    found = network(IMAGES)
    assert network.dim == dim
    assert (found.dtype, found.shape) == (torch.float32, (5, dim))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.std(0).mean() > 1e-4  # images are told apart


def test_the_classifier_would_classify_these_features(tmp_path: Path) -> None:
    model = save("resnet", tmp_path)
    features = load_feature_network(str(tmp_path))(IMAGES)
    with torch.no_grad():
        logits = model(FED).logits
        torch.testing.assert_close(model.classifier[-1](features), logits, rtol=1e-5, atol=1e-6)


def test_batches_bytes_and_the_mode_do_not_matter(tmp_path: Path) -> None:
    save("resnet", tmp_path)
    network = load_feature_network(str(tmp_path))
    whole = network(IMAGES)
    network.batch_size = 2
    torch.testing.assert_close(network(IMAGES), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(network(eight_bit(IMAGES)), network(IMAGES))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(IMAGES), network(IMAGES.clone()))
        torch.testing.assert_close(network(IMAGES), whole, rtol=1e-5, atol=1e-6)
    assert not any(module.training for module in network.module.modules())
    assert not any(p.requires_grad for p in network.module.parameters())
    assert network(IMAGES[:0]).shape == (0, 20)


def test_images_are_judged_as_they_would_be_saved() -> None:
    images = torch.tensor([-1.0, 0.0, 0.5 / 255, 0.6 / 255, 1.0, 7.0])
    assert eight_bit(images).tolist() == [0, 0, 0, 1, 255, 255]
    with pytest.raises(ValueError, match=r"int64.*floating in \[0, 1\]"):
        eight_bit(torch.ones(1, dtype=torch.int64))


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    save("resnet", tmp_path)
    network = load_feature_network(str(tmp_path))
    with pytest.raises(ValueError, match=r"\(5, 1, 16, 16\); give \(B, 3, H, W\)"):
        network(IMAGES[:, :1])


def refusal(path: Path | str) -> str:
    with pytest.raises(FeatureNetworkError) as caught:
        load_feature_network(str(path))
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "no such folder" in message


def test_pickles_are_not_read(tmp_path: Path) -> None:
    """The weights are there, as a pickle that would leave a file behind."""
    save("resnet", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    bomb = f"cposix\nsystem\n(S'touch {tmp_path / 'ran'}'\ntR."
    (tmp_path / "pytorch_model.bin").write_text(bomb)
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message
    # Nor where another file of the wanted kind lies beside it.
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert "cannot be loaded" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    save("resnet", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "cannot be loaded" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_lost_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save("vit", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if "embeddings.cls_token" in key)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "1 of its weights are not in its file" in refusal(tmp_path)
    assert "cls_token" in refusal(tmp_path)


def test_a_missing_preprocessor_is_told_with_an_example_that_works(tmp_path: Path) -> None:
    save("vit", tmp_path, preprocessor=None)
    message = refusal(tmp_path)
    assert "has no preprocessor_config.json" in message
    example = re.search(r"\{.*\}", message)
    assert example is not None
    fields = json.loads(example[0]) | {"size": {"height": 16, "width": 16}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    assert load_feature_network(str(tmp_path)).dim == 24


def test_images_of_the_wrong_size_are_found_out_before_training(tmp_path: Path) -> None:
    save("vit", tmp_path, PREPROCESSOR | {"do_resize": False})
    assert "preprocessor_config.json must resize" in refusal(tmp_path)


def test_the_hub_out_of_reach_is_told_with_the_remedy() -> None:
    message = refusal("nobody/has-this-network")
    assert "nobody/has-this-network cannot be loaded" in message
    assert "--eval_feature_model" in message


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "vision model alone" in refusal(tmp_path)


def test_a_module_without_vectors_is_refused() -> None:
    with pytest.raises(FeatureNetworkError, match="not one vector"):
        FeatureNetwork("mine", nn.Identity())
