"""Latent spaces against diffusers' own models and against their formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusers_curriculum.models.latent_space import LatentSpace
from tests.pipelines.parts_fixtures import (
    AUTOENCODERS,
    generator,
    tiny_dit,
    tiny_kl,
    tiny_vit,
    tiny_vq,
)

IMAGES = torch.rand(5, 3, 16, 16, generator=generator()) * 2 - 1


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_pixels_are_their_own_latents() -> None:
    space = LatentSpace.of(None)
    mean, std = space.encode(IMAGES)
    assert torch.equal(mean, IMAGES)
    assert std is None
    assert torch.equal(space.decode(mean), IMAGES)
    assert (space.kind, space.shape(17)) == ("pixels", (3, 17, 17))


@pytest.mark.parametrize("shift", [None, 0.25])
def test_the_latents_of_a_kl_autoencoder(shift: float | None) -> None:
    vae = tiny_kl(shift_factor=shift)
    posterior = vae.encode(IMAGES).latent_dist
    mean, std = LatentSpace.of(vae).encode(IMAGES)
    close(mean, (posterior.mean - (shift or 0)) * 0.5)
    assert std is not None
    close(std, posterior.std * 0.5)
    close(LatentSpace.of(vae).decode(mean), vae.decode(posterior.mean).sample)


def test_latents_with_a_mean_and_std_per_channel() -> None:
    centre, spread = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    vae = tiny_kl(latents_mean=centre, latents_std=spread)
    posterior = vae.encode(IMAGES).latent_dist
    mean, std = LatentSpace.of(vae).encode(IMAGES)
    assert std is not None
    for channel in range(4):
        scale = 0.5 / spread[channel]
        close(mean[:, channel], (posterior.mean[:, channel] - centre[channel]) * scale)
        close(std[:, channel], posterior.std[:, channel] * scale)
    close(LatentSpace.of(vae).decode(mean), vae.decode(posterior.mean).sample)


@pytest.mark.parametrize(
    "settings",
    [
        {"latents_mean": [0.0] * 4},
        {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1},
    ],
)
def test_two_centres_are_told(settings: Any) -> None:
    with pytest.raises(ValueError, match="set both of the first two, or only shift_factor"):
        LatentSpace.of(tiny_kl(**settings))


def test_the_latents_of_a_vq_model_are_continuous_and_decoding_quantises() -> None:
    vae = tiny_vq()
    plain = vae.encode(IMAGES).latents
    space = LatentSpace.of(vae)
    mean, std = space.encode(IMAGES)
    assert std is None
    close(mean, plain * 0.7)
    codes = vae.quantize.embedding.weight
    tokens = plain.permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = codes[torch.cdist(tokens, codes).argmin(1)]
    quantised = nearest.view(5, 8, 8, 4).permute(0, 3, 1, 2)
    close(space.decode(mean), vae.decode(quantised, force_not_quantize=True).sample)
    assert (
        space.decode(mean) - vae.decode(plain, force_not_quantize=True).sample
    ).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [None, 3.0])
def test_the_latents_of_a_vit_vq_model(factor: float | None) -> None:
    vae = tiny_vit(scaling_factor=factor)
    space = LatentSpace.of(vae)
    mean, std = space.encode(IMAGES)
    assert std is None
    scale = factor or 8**0.5
    close(mean.norm(dim=1), torch.full((5, 4, 4), scale), 1e-4)
    assert factor or mean.square().mean().item() == pytest.approx(1.0, abs=1e-4)  # unit rms
    close(mean / scale, vae.encode(IMAGES).latents)
    assert torch.equal(vae.indices(mean / scale), vae(IMAGES).indices)


def test_vectors_that_left_the_sphere_are_brought_back_and_snapped() -> None:
    vae = tiny_vit()
    space = LatentSpace.of(vae)
    mean = space.encode(IMAGES).mean
    expected = vae.decode(mean / 8**0.5).sample
    lengths = torch.rand(5, 1, 4, 4, generator=generator()) * 3 + 0.1
    close(space.decode(mean * lengths), expected)
    codes = normalize(vae.quantise.codebook(), dim=-1)
    nearest = codes[vae.indices(mean)].permute(0, 3, 1, 2)
    close(vae.decode(nearest, force_not_quantize=True).sample, expected)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_batches_do_not_matter_and_what_comes_out_is_float32(name: str) -> None:
    vae = AUTOENCODERS[name]()
    whole, parts = LatentSpace.of(vae), LatentSpace.of(vae, batch_size=2)
    mean, std = whole.encode(IMAGES)
    cut = parts.encode(IMAGES)
    close(cut.mean, mean)
    assert (cut.std is None) == (std is None)
    close(parts.decode(mean), whole.decode(mean), 1e-4)
    assert mean.shape == (5, *whole.shape(16))
    if vae is not None:
        vae.to(torch.bfloat16)
    half = whole.encode(IMAGES.double())
    assert half.mean.dtype == torch.float32
    assert half.std is None or half.std.dtype == torch.float32
    assert whole.decode(half.mean).dtype == torch.float32
    assert not half.mean.requires_grad


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel", "ViTVQModel"])
def test_a_saved_autoencoder_is_loaded_by_its_class(name: str, tmp_path: Path) -> None:
    vae = AUTOENCODERS[name]()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    space = LatentSpace.load(str(tmp_path / "pipeline"), subfolder="vae")
    assert space.kind == name
    assert type(space.model) is type(vae)
    assert not space.model.training
    assert not any(weight.requires_grad for weight in space.model.parameters())
    expected = LatentSpace.of(vae).encode(IMAGES).mean
    close(space.encode(IMAGES).mean, expected)
    half = LatentSpace.load(str(tmp_path / "pipeline" / "vae"), dtype=torch.float16)
    assert half.model.dtype == torch.float16


def test_other_classes_and_missing_files_are_told(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"holds a DiTTransformer2DModel.*AutoencoderKL, VQModel"):
        LatentSpace.load(str(tmp_path / "dit"))
    with pytest.raises(ValueError, match="DiTTransformer2DModel is no known autoencoder"):
        LatentSpace.of(tiny_dit())
    with pytest.raises(ValueError, match=r"nowhere.*cannot be loaded"):
        LatentSpace.load(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match=r"its config\.json cannot be loaded"):
        LatentSpace.load(str(tmp_path), subfolder="vae")  # not the folder above
    with pytest.raises(ValueError, match=r"its AutoencoderKL cannot be loaded.*safetensors"):
        LatentSpace.load(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list instead of an object"):
        LatentSpace.load(str(tmp_path))


def test_only_safetensors_are_loaded(tmp_path: Path) -> None:
    tiny_kl().save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").exists()
    with pytest.raises(ValueError, match="cannot be loaded"):
        LatentSpace.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "resolution", "expected"),
    [
        ("AutoencoderKL", 64, (4, 32, 32)),
        ("VQModel", 18, (4, 9, 9)),
        ("ViTVQModel", 16, (8, 4, 4)),
        ("AutoencoderKL", 15, "positive multiple of 2"),
        ("VQModel", 0, "positive multiple of 2"),
        ("ViTVQModel", 20, "takes images of 16 x 16 pixels only"),
    ],
)
def test_shapes(name: str, resolution: int, expected: Any) -> None:
    space = LatentSpace.of(AUTOENCODERS[name]())
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            space.shape(resolution)
    else:
        assert space.shape(resolution) == expected
        if resolution <= 18:
            images = torch.zeros(1, 3, resolution, resolution)
            assert tuple(space.encode(images).mean.shape[1:]) == expected


def test_a_codebook_of_other_length_than_the_encoder_decides_the_channels() -> None:
    space = LatentSpace.of(tiny_vq(vq_embed_dim=6))
    assert space.shape(16) == (6, 8, 8)
    assert space.encode(IMAGES).mean.shape == (5, 6, 8, 8)


def test_an_empty_batch_size_is_told() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        LatentSpace.of(None, batch_size=0)
