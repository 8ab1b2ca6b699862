"""The codebook: nearest codes, the two-sided loss, straight-through, usage, revival."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from diffusers_curriculum.models.vector_quantiser import VectorQuantiser, codebook_usage


def quantiser(codes: int = 12, dim: int = 5, beta: float = 0.25) -> VectorQuantiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return VectorQuantiser(codes, dim, beta)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_code_is_the_nearest_by_euclidean_distance_of_unit_vectors() -> None:
    model, inputs = quantiser(), vectors(4, 6, 5) * 3
    found = model(inputs)
    units = (inputs / inputs.norm(dim=-1, keepdim=True)).double()
    weight = model.embedding.weight.detach().double()
    codes = weight / weight.norm(dim=-1, keepdim=True)
    distances = (units[..., None, :] - codes).norm(dim=-1)
    assert torch.equal(found.indices, distances.argmin(-1))
    assert torch.allclose(found.codes.double(), codes[found.indices], atol=1e-6)
    assert torch.equal(found.codes.detach(), model.codebook()[found.indices].detach())


def test_more_vectors_than_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = quantiser(), vectors(9, 7, 5)
    whole = model.nearest(inputs)
    monkeypatch.setattr("diffusers_curriculum.models.vector_quantiser._ROWS", 4)
    assert torch.equal(model.nearest(inputs), whole)
    assert whole.shape == (9, 7)


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_loss_and_its_gradients_are_those_of_the_formula(beta: float) -> None:
    model, inputs = quantiser(beta=beta), vectors(8, 5).requires_grad_()
    found = model(inputs)
    units = normalize(inputs.detach().double(), dim=-1).requires_grad_()
    weight = model.embedding.weight.detach().double().requires_grad_()
    codes = normalize(weight, dim=-1)[found.indices]
    loss = ((codes - units.detach()) ** 2).mean() + beta * ((units - codes.detach()) ** 2).mean()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    found.loss.backward()
    loss.backward()
    assert torch.allclose(model.embedding.weight.grad.double(), weight.grad, atol=1e-7)  # type: ignore
    # through the division by the length: the part along the vector goes, the rest is divided
    length = inputs.detach().double().norm(dim=-1, keepdim=True)
    along = (units.grad * units).sum(-1, keepdim=True) * units  # type: ignore
    expected = (units.grad - along) / length  # type: ignore
    assert torch.allclose(inputs.grad.double(), expected, atol=1e-7)  # type: ignore


def test_the_gradient_of_the_codes_goes_to_the_vectors_unchanged() -> None:
    model, inputs = quantiser(), vectors(8, 5).requires_grad_()
    weights = vectors(8, 5, seed=1)
    (model(inputs).codes * weights).sum().backward()
    assert torch.equal(inputs.grad, weights)  # type: ignore
    assert model.embedding.weight.grad is None


def test_half_precision_does_not_change_which_code_is_nearest() -> None:
    model = VectorQuantiser(64, 5)
    # codes so near to each other that bfloat16 cannot tell them apart
    with torch.no_grad():
        model.embedding.weight.copy_(torch.ones(5) + 3e-2 * vectors(64, 5, seed=2))
    inputs = model.embedding.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(inputs).indices, torch.arange(64))


def test_usage_is_counted_over_a_window() -> None:
    model = quantiser(codes=4)
    model.observe(torch.tensor([[0, 0], [0, 1]]))
    model.observe(torch.tensor([1, 1, 1, 0]))
    assert model.idle.tolist() == [0, 0, 2, 2]
    usage = model.read_usage()
    assert usage.used == 0.5
    assert usage.perplexity == pytest.approx(2.0)
    assert model.read_usage() == (0.0, 0.0)
    assert model.idle.tolist() == [0, 0, 2, 2]


def test_perplexity_is_exp_of_the_entropy() -> None:
    counts = torch.tensor([5, 0, 3, 12])
    shares = [n / 20 for n in (5, 3, 12)]
    usage = codebook_usage(counts)
    assert usage.used == 0.75
    assert usage.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_an_update_that_was_left_out_counts_nothing() -> None:
    model, codes = quantiser(codes=4), torch.tensor([[0, 0], [0, 1]])
    for left_out, counts, idle in ((True, [0] * 4, [0] * 4), (False, [3, 1, 0, 0], [0, 0, 1, 1])):
        model.observe(codes, torch.tensor(left_out))
        assert model.counts.tolist() == counts
        assert model.idle.tolist() == idle


def test_vectors_that_are_not_finite_revive_nothing() -> None:
    model = idle_quantiser()
    before = model.embedding.weight.clone()
    spoilt = torch.full((8, 5), torch.nan)
    assert int(model.revive(spoilt, np.random.default_rng(0), patience=1)) == 0
    assert torch.equal(model.embedding.weight, before)


def idle_quantiser(codes: int = 6) -> VectorQuantiser:
    """Codes 0 and 2 in use, the others idle for three updates."""
    model = quantiser(codes)
    for _ in range(3):
        model.observe(torch.tensor([0, 2]))
    return model


def test_only_idle_codes_are_revived_each_from_another_vector() -> None:
    model, inputs = idle_quantiser(), vectors(2, 4, 5)
    before = model.embedding.weight.detach().clone()
    revived = model.revive(inputs, np.random.default_rng(0), patience=3)
    after, units = model.embedding.weight.detach(), normalize(inputs.reshape(8, 5), dim=-1)
    assert int(revived) == 4
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    sources = [
        int((units - normalize(after[i], dim=0)).norm(dim=-1).argmin()) for i in (1, 3, 4, 5)
    ]
    assert len(set(sources)) == 4
    for code, source in zip((1, 3, 4, 5), sources, strict=True):
        assert torch.allclose(after[code], units[source] * math.sqrt(5), atol=1e-6)
        assert int(model.nearest(inputs.reshape(8, 5)[source])) == code
    assert model.idle.tolist() == [0] * 6


def test_nothing_is_revived_before_its_time() -> None:
    model = idle_quantiser()
    before = model.embedding.weight.detach().clone()
    assert int(model.revive(vectors(8, 5), np.random.default_rng(0), patience=4)) == 0
    assert torch.equal(model.embedding.weight, before)
    assert model.idle.tolist() == [0, 3, 0, 3, 3, 3]


def test_fewer_vectors_than_codes_are_taken_more_than_once() -> None:
    model, inputs = idle_quantiser(), vectors(2, 5)
    assert int(model.revive(inputs, np.random.default_rng(0), patience=1)) == 4
    assert set(model.nearest(inputs).tolist()) <= {1, 3, 4, 5}


def test_the_generator_alone_chooses() -> None:
    def revived(seed: int) -> torch.Tensor:
        model = idle_quantiser()
        model.revive(vectors(50, 5), np.random.default_rng(seed), patience=1)
        return model.embedding.weight.detach()

    state = torch.random.get_rng_state()
    assert torch.equal(revived(1), revived(1))
    assert not torch.equal(revived(1), revived(2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_statistics_are_part_of_the_state() -> None:
    model, other = idle_quantiser(), quantiser(6)
    other.load_state_dict(model.state_dict())
    assert other.idle.tolist() == [0, 3, 0, 3, 3, 3]
    assert other.read_usage() == model.read_usage()


def test_revival_finds_the_clusters_that_a_bad_start_misses() -> None:
    """Sixteen tight clusters, and codes that all start at one of them: without revival one wins."""
    centres = normalize(vectors(16, 8, seed=5), dim=-1)

    def used(patience: int) -> float:
        model = quantiser(16, 8)
        with torch.no_grad():
            model.embedding.weight.copy_(centres[:1] + 1e-3 * vectors(16, 8, seed=6))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for step in range(60):
            batch = centres + 0.02 * vectors(16, 8, seed=100 + step)
            found = model(batch)
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
            model.observe(found.indices)
            if patience:
                model.revive(batch, np.random.default_rng(step), patience)
        return codebook_usage(torch.bincount(model.nearest(centres), minlength=16)).used

    assert used(patience=0) <= 0.5
    assert used(patience=3) >= 0.8


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((1, 5), "codes=1 must be a whole number from 2"),
        ((4, 0), "dim=0 must be a whole number from 1"),
        ((4, 5, -1.0), "beta=-1.0"),
        ((4, 5, math.nan), "beta=nan"),
    ],
)
def test_sizes_that_cannot_be(arguments: tuple[float, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        VectorQuantiser(*arguments)  # type: ignore


def test_revival_needs_patience_and_vectors() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="patience=0"):
        quantiser().revive(vectors(3, 5), rng, patience=0)
    with pytest.raises(ValueError, match="with 0 vectors"):
        quantiser().revive(torch.empty(0, 5), rng, patience=1)
