"""The causal language model over codes, and the codes themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint

from diffusers_curriculum.models.code_space import CodeSpace
from diffusers_curriculum.models.image_tokens import ImageTokenTransformer
from diffusers_curriculum.models.latent_space import LatentSpace
from tests.pipelines.parts_fixtures import (
    generator,
    tiny_kl,
    tiny_token_transformer,
    tiny_vit,
    tiny_vq,
)

LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"model_type": "llama", "model_args": LLAMA | {"intermediate_size": 32}},
}


def some_codes(count: int = 3) -> Tensor:
    return torch.randint(16, (count, 16), generator=generator())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_code_is_told_of_those_before_it_and_of_its_class(kind: str) -> None:
    network, codes = tiny_token_transformer(**KINDS[kind]), some_codes()
    labels = torch.tensor([0, 2, 3])
    before = network(codes[:, :-1], labels).logits
    assert before.shape == (3, 16, 16)
    other = codes.clone()
    other[:, 5] = (other[:, 5] + 1) % 16
    changed = (network(other[:, :-1], labels).logits != before).any(-1).any(0)
    assert changed.tolist() == [False] * 6 + [True] * 10  # position 5 does not see itself
    classes = network(codes[:, :-1], labels.roll(1)).logits
    assert (classes != before).any(-1).all()
    null = network(codes[:, :-1]).logits
    assert torch.equal(null[2], before[2])
    assert not torch.equal(null[0], before[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_keys_and_values_are_kept(kind: str) -> None:
    network, codes = tiny_token_transformer(**KINDS[kind]), some_codes()
    labels = torch.tensor([0, 2, 3])
    logits, cache = network.following(network.first_tokens(labels))
    each = [logits]
    for position in range(15):
        logits, cache = network.following(codes[:, position : position + 1], cache)
        each.append(logits)
    expected = network(codes[:, :-1], labels).logits
    torch.testing.assert_close(torch.stack(each, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    network, codes = tiny_token_transformer(**KINDS[kind]), some_codes()
    network.save_pretrained(tmp_path)
    loaded: Any = ImageTokenTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(codes[:, :-1]).logits, network(codes[:, :-1]).logits)


def test_layers_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"n_layer": 2, "n_embd": 16, "n_head": 2}
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    network = tiny_token_transformer(model_args=settings).train()
    codes, calls = some_codes(), []

    def gradients() -> list[Tensor]:
        loss = network(codes[:, :-1]).logits.square().sum()
        return list(torch.autograd.grad(loss, [*network.parameters()]))

    kept, plain = checkpoint.checkpoint, gradients()
    monkeypatch.setattr(
        checkpoint, "checkpoint", lambda *a, **k: (calls.append(a), kept(*a, **k))[1]
    )
    network.enable_gradient_checkpointing()
    again = gradients()
    assert len(calls) == 2
    for first, second in zip(plain, again, strict=True):
        torch.testing.assert_close(first, second)


@torch.no_grad()
def test_features_are_of_the_middle_and_know_no_class() -> None:
    network, codes = tiny_token_transformer(), some_codes()
    states = network.causal_lm(
        input_ids=torch.cat([torch.full((3, 1), 16 + 3), codes[:, :-1]], 1),
        output_hidden_states=True,
    ).hidden_states
    assert len(states) == 3  # the embedding, and two layers
    assert torch.equal(network.features(codes), states[1].mean(1))
    assert torch.equal(network.features(codes, layer=0), states[0].mean(1))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "gpt9"}, "model_type='gpt9' is none of transformers"),
        ({"model_args": {"n_layr": 2}}, "n_layr=2, and gpt2 has no such setting"),
        ({"model_args": {"vocab_size": 9}}, "vocab_size=9, and the codes decide that"),
        ({"num_positions": 0}, "num_positions=0 must be"),
        ({"codebook_size": 1}, "codebook_size=1 must be"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tiny_token_transformer(**changes)


@pytest.mark.parametrize("build", [tiny_vit, tiny_vq])
@torch.no_grad()
def test_codes_decode_as_their_image_does(build: Any) -> None:
    vae, images = build(), torch.rand(5, 3, 16, 16, generator=generator()) * 2 - 1
    space = CodeSpace.of(LatentSpace.of(vae, batch_size=2))
    codes, latents = space.encode(images), vae.encode(images, return_dict=False)[0]
    assert (codes.shape, codes.dtype) == ((5, *latents.shape[2:]), torch.int64)
    assert (space.codebook_size, codes.unique().numel() > 2) == (16, True)
    expected = vae.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(space.decode(codes), expected, rtol=1e-4, atol=1e-4)


def test_an_autoencoder_without_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="AutoencoderKL has no codebook"):
        CodeSpace.of(LatentSpace.of(tiny_kl()))
