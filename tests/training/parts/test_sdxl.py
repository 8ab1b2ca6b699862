"""Stable Diffusion XL: what its UNet is told, where its parts come from, and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import nn

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.cache.filling import Processes
from diffusers_curriculum.training.data.transforms import Crop
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts import components
from diffusers_curriculum.training.parts.captions import CaptionEncoder, kept_captions
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.storage.fingerprints import model_identity
from diffusers_curriculum.training.tasks.text_to_image_sdxl import TextToImageSDXL

FAMILY = families()["sdxl"]
CPU = torch.device("cpu")
CAPTIONS = ("a photo of a red bird", "a bird", "")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    folder = tmp_path_factory.mktemp("sdxl") / "pipeline"
    FAMILY.save_tiny(folder)
    return folder


@pytest.fixture
def copied(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change; its weights may not be loaded."""
    monkeypatch.setattr(components, "load_whole", lambda *a, **k: pytest.fail("loaded"))
    return Path(shutil.copytree(pipeline, tmp_path / "copy"))


def arguments(folder: Path, *more: object) -> Arguments:
    line = ["--pretrained_model_name_or_path", str(folder), "--dataset_name", "some/data"]
    line += ["--resolution", "16", *map(str, more)]
    return TextToImageSDXL().parse(line, machine=False)


def load(args: Arguments, dtype: torch.dtype = torch.float32) -> components.Components:
    return FAMILY.load_components(args, FAMILY.load_tokenizers(args), CPU, dtype)


def choose(folder: Path, *more: object) -> None:
    """What a run does before it looks at its data."""
    TextToImageSDXL().choose(arguments(folder, *more), 0)


# -- what the network is told ----------------------------------------------------------------------


def test_captions_are_told_as_the_pipeline_tells_them(pipeline: Path) -> None:
    models = load(arguments(pipeline))
    tokens = FAMILY.tokenize(models.tokenizers, CAPTIONS)
    with torch.no_grad():
        found = FAMILY.encode_text(models, tokens)
    drawn: Any = StableDiffusionXLPipeline.from_pretrained(pipeline)
    states, _, pooled, _ = drawn.encode_prompt([*CAPTIONS], do_classifier_free_guidance=False)
    assert torch.equal(found["encoder_hidden_states"], states)
    assert torch.equal(found["text_embeds"], pooled)
    assert len({tuple(row.tolist()) for row in pooled}) == len(CAPTIONS)


def test_sizes_are_told_as_the_pipeline_tells_them(pipeline: Path) -> None:
    tell = FAMILY.size_conditioning()
    assert tell is not None
    found = tell(Crop((480, 640), (3, 17), (16, 16)))["time_ids"]
    drawn: Any = StableDiffusionXLPipeline.from_pretrained(pipeline)
    width = drawn.text_encoder_2.config.projection_dim
    told = drawn._get_add_time_ids((480, 640), (3, 17), (16, 16), torch.float32, width)
    assert torch.equal(found, told[0])


@pytest.mark.parametrize("name", ["text_embeds", "time_ids", "encoder_hidden_states"])
def test_the_network_hears_all_of_it(pipeline: Path, name: str) -> None:
    network = load(arguments(pipeline)).network
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder_hidden_states": (1, 77, 32), "text_embeds": (1, 16), "time_ids": (1, 6)}
    told = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    noisy, at = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500])
    with torch.no_grad():
        first = FAMILY.predict(network, noisy, at, told)
        other = FAMILY.predict(network, noisy, at, told | {name: told[name] + 1})
    assert first.shape == noisy.shape
    assert not torch.equal(first, other)


def test_captions_that_are_kept_are_told_as_alone(pipeline: Path, tmp_path: Path) -> None:
    models = load(arguments(pipeline))
    captions = [f"picture {number}" for number in range(FAMILY.captions_at_once + 2)]
    where = {"folder": tmp_path / "c", "processes": Processes(progress=False)}
    encoder = CaptionEncoder(FAMILY, models, CPU)
    found = kept_captions(captions, lambda: encoder, fingerprint={}, **where)
    for caption in captions:
        alone = encoder.encoded(FAMILY.tokenize(models.tokenizers, [caption]))
        assert found[caption].keys() == alone.keys()
        for name, told in alone.items():
            torch.testing.assert_close(found[caption][name], told, atol=1e-5, rtol=1e-5)


# -- where its parts come from ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_autoencoder_is_precise_under_any_precision(pipeline: Path, dtype: torch.dtype) -> None:
    models = load(arguments(pipeline), dtype)
    parts: dict[str, nn.Module] = {"vae": models.vae, "unet": models.network, **models.encoders}
    dtypes = {name: {p.dtype for p in part.parameters()} for name, part in parts.items()}
    precise = {torch.float32}
    assert dtypes.pop("vae") == dtypes.pop("unet") == precise
    assert dtypes == {name: {dtype} for name in ("text_encoder", "text_encoder_2")}


@pytest.fixture
def other_vae(pipeline: Path, tmp_path: Path) -> Path:
    """An autoencoder with other weights."""
    vae: Any = AutoencoderKL.from_pretrained(pipeline / "vae")
    nn.init.constant_(vae.encoder.conv_in.weight, 0.25)
    vae.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("inside", [False, True])
def test_an_autoencoder_of_its_own_is_trained_with_and_exported(
    pipeline: Path, other_vae: Path, tmp_path: Path, inside: bool
) -> None:
    place = other_vae
    if inside:  # of a whole pipeline
        place = tmp_path / "whole"
        shutil.copytree(other_vae, place / "vae")
    args = arguments(pipeline, "--pretrained_vae_model_name_or_path", place)
    models = load(args)
    assert bool((models.vae.encoder.conv_in.weight == 0.25).all())
    assert models.base is not None
    schedulers = FAMILY.load_schedulers(args)
    FAMILY.save_pipeline(models.base, models.network, schedulers[1], tmp_path / "out")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        ours, theirs = tmp_path / "out" / "vae" / name, other_vae / name
        assert ours.read_bytes() == theirs.read_bytes()
    loaded: Any = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    assert loaded.config.force_zeros_for_empty_prompt is True
    assert loaded.text_encoder_2.config.projection_dim == 16


def test_an_autoencoder_that_is_none_is_told_by_its_flag(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    args = arguments(pipeline, "--pretrained_vae_model_name_or_path", tmp_path / "empty")
    told = "--pretrained_vae_model_name_or_path .*its vae cannot be loaded .*a saved AutoencoderKL"
    with pytest.raises(UsageError, match=f"(?s){told}"):
        load(args)


def test_all_frozen_parts_tell_the_base_model(pipeline: Path, tmp_path: Path) -> None:
    before = model_identity(str(pipeline), None, None)
    for part in ("text_encoder", "text_encoder_2", "tokenizer_2", "vae"):
        folder = Path(shutil.copytree(pipeline, tmp_path / part))
        (folder / part / "config.json").write_text("{}")
        assert model_identity(str(folder), None, None) != before


# -- what does not fit -----------------------------------------------------------------------------


def edited(name: str, **changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


UNET, SECOND, INDEX = "unet/config.json", "text_encoder_2/config.json", "model_index.json"
MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "sd": (edited(INDEX, text_encoder_2=[None, None]), "it has no text_encoder_2"),
    "refiner": (
        edited(UNET, projection_class_embeddings_input_dim=56),
        "its unet takes 56 numbers of sizes and pooled captions, and is given 64",
    ),
    "pooled": (edited(SECOND, projection_dim=24), "takes 64 numbers .*, and is given 72"),
    "width": (edited(SECOND, hidden_size=8), "is 32, and its two text encoders give 24"),
    "bert": (edited(SECOND, model_type="bert"), "its text_encoder_2/config.json is one of 'bert'"),
    "embedding": (edited(UNET, addition_embed_type="text"), "addition_embed_type is 'text'"),
    "inpainting": (edited(UNET, in_channels=9), "its unet takes 9 channels"),
    "image": (edited(UNET, encoder_hid_dim_type="image_proj"), "it wants more than a caption"),
    "positions": (edited(SECOND, max_position_embeddings=9), "its text_encoder_2 has 9 positions"),
    "words": (edited(SECOND, vocab_size=9), "its text_encoder_2 embeddings for 9"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_parts_that_do_not_fit(copied: Path, name: str) -> None:
    change, told = MISFITS[name]
    choose(copied)
    change(copied)
    with pytest.raises(UsageError, match=f"(?s)--pretrained_model_name_or_path .*{told}"):
        choose(copied)


def test_another_kind_of_autoencoder_is_refused(copied: Path, tmp_path: Path) -> None:
    config = {"_class_name": "AutoencoderTiny", "latent_channels": 4}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="its vae is a AutoencoderTiny"):
        choose(copied, "--pretrained_vae_model_name_or_path", tmp_path / "tiny")
