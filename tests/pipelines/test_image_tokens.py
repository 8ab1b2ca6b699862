"""Images drawn code by code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_curriculum.pipelines import ImageTokenPipeline
from diffusers_curriculum.pipelines.image_tokens import Choice
from tests.pipelines.parts_fixtures import (
    generator,
    tiny_kl,
    tiny_token_transformer,
    tiny_vit,
    tiny_vq,
)

NAMES = {0: "cat", 1: "dog, hound", 2: "bird"}


def pipeline(**parts: Any) -> Any:
    made = {"transformer": tiny_token_transformer(), "vae": tiny_vit(), "id2label": NAMES}
    found: Any = ImageTokenPipeline(**made | parts)
    found.set_progress_bar_config(disable=True)
    return found


def codes_of(pipe: Any, *labels: Any, seeds: tuple[int, ...] = (0, 1, 2), **given: Any) -> Tensor:
    generators = [generator(seed) for seed in seeds]
    return pipe([*labels], generator=generators, output_type="codes", **given).images


def law(logits: np.ndarray, without: np.ndarray, choice: Choice) -> np.ndarray:
    """The probabilities, written out."""
    if choice.guidance > 1:
        logits = without + choice.guidance * (logits - without)
    mass = np.exp((logits - logits.max()) / choice.temperature)
    order = np.argsort(-mass)
    if choice.top_k is not None:
        mass[order[choice.top_k :]] = 0
    mass /= mass.sum()
    if choice.top_p is not None:
        before = np.cumsum(mass[order]) - mass[order]
        mass[order[before >= choice.top_p]] = 0
    return mass / mass.sum()


@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        Choice(guidance=2.5),
        Choice(temperature=0.5),
        Choice(top_k=3),
        Choice(top_p=0.7),
        Choice(guidance=1.5, temperature=1.3, top_k=5, top_p=0.8),
    ],
)
def test_codes_follow_their_law(choice: Choice) -> None:
    logits, without = torch.randn(2, 8, generator=generator()).mul(1.5)
    count = 100_000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    rows = [logits.expand(count, 8)] + ([without.expand(count, 8)] if choice.guidance > 1 else [])
    found = torch.bincount(choice.codes(torch.cat(rows), u), minlength=8).double() / count
    expected = law(logits.double().numpy(), without.double().numpy(), choice)
    assert np.abs(found.numpy() - expected).max() < 3e-5


def test_the_ends_are_codes_with_mass() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for u, code in ((0.0, 1), (1 - 2**-53, 2)):
        assert Choice().codes(logits, torch.tensor([u], dtype=torch.float64)).item() == code


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_each_code_is_chosen_given_all_before_it(scale: float) -> None:
    pipe, choice = pipeline(), Choice(guidance=scale, top_k=6)
    codes = codes_of(pipe, "cat", "hound", 2, guidance_scale=scale, top_k=6).flatten(1)
    u = torch.stack([torch.rand(16, generator=generator(n), dtype=torch.float64) for n in range(3)])
    logits = pipe.transformer(codes[:, :-1], torch.tensor([0, 1, 2])).logits
    without = pipe.transformer(codes[:, :-1]).logits
    for position in range(16):
        rows = [logits[:, position]] + ([without[:, position]] if scale > 1 else [])
        assert torch.equal(choice.codes(torch.cat(rows), u[:, position]), codes[:, position])
    assert len(codes.unique()) > 5


def test_an_image_depends_on_its_generator_and_class_alone() -> None:
    pipe = pipeline()
    together = codes_of(pipe, 0, 1, 2)
    alone = torch.cat([codes_of(pipe, n, seeds=(n,)) for n in range(3)])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], codes_of(pipe, 1, seeds=(0,))[0])


def test_images_of_any_class() -> None:
    pipe = pipeline()
    any_class = pipe(batch_size=2, generator=generator(), output_type="codes").images
    null = pipe([3, 3], generator=generator(), output_type="codes").images
    assert torch.equal(any_class, null)
    guided = pipe(batch_size=2, generator=generator(), output_type="codes", guidance_scale=3.0)
    assert torch.equal(guided.images, null)  # there is no class to be guided to


@pytest.mark.parametrize("vae", [tiny_vit, tiny_vq])
def test_a_saved_pipeline_draws_the_same(vae: Any, tmp_path: Path) -> None:
    model = tiny_token_transformer(num_positions=16 if vae is tiny_vit else 64)
    pipe = pipeline(transformer=model, vae=vae())
    images = pipe(["dog", 0], generator=generator(), output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert 0 <= images.min() < images.max() <= 1
    pipe.save_pretrained(tmp_path)
    loaded: Any = ImageTokenPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == pipe.labels
    again = loaded(["dog", 0], generator=generator(), output_type="np").images
    assert np.array_equal(again, images)
    assert pipe([1], generator=generator()).images[0].size == (16, 16)


def test_what_cannot_be_is_refused() -> None:
    pipe = pipeline()
    refused = (
        ({"class_labels": ["fish"]}, "'fish' is the name of 0 classes"),
        ({"class_labels": [4]}, r"\[4\] is no class"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"output_type": "latent"}, "output_type='latent'"),
        ({"class_labels": [0, 1], "generator": [generator()]}, "1 generators for 2 images"),
    )
    for given, told in refused:
        with pytest.raises(ValueError, match=told):
            pipe(**given)
    with pytest.raises(ValueError, match="has no codebook"):
        pipeline(vae=tiny_kl())
    with pytest.raises(ValueError, match="knows 16 codes in 16 places, and the autoencoder has 8"):
        pipeline(vae=tiny_vit(codebook_size=8))
    with pytest.raises(ValueError, match="the autoencoder has 16 in 64"):
        pipeline(vae=tiny_vit(patch_size=2))
    with pytest.raises(ValueError, match=r"names the classes \[7\]"):
        pipeline(id2label={7: "eel"})
