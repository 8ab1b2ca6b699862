"""Gradient norms of single samples, and who is told of them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from diffusers_curriculum import CurriculumTimestepSampler, DensityTimestepSampler
from diffusers_curriculum.samplers import (
    GradientNormTimestepSampler,
    SequenceTimestepSampler,
    gradient_norm_samplers,
    per_sample_gradient_norms,
)
from tests.floors_fixtures import SCHEDULERS, untouched_global_generators


def _sampler(**kwargs: object) -> GradientNormTimestepSampler:
    return GradientNormTimestepSampler(SCHEDULERS["sd"](), **kwargs)  # type: ignore[arg-type]


def _data(seed: int = 0, samples: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, width, generator=generator),
        torch.randn(samples, generator=generator),
    )


def test_norms_of_a_linear_model_are_those_of_pencil_and_paper() -> None:
    x, y = _data()
    weight, bias = torch.randn(5, requires_grad=True), torch.zeros((), requires_grad=True)
    residual = x @ weight + bias - y
    found = per_sample_gradient_norms(residual.square(), [weight, bias])
    expected = 4 * residual.square() * (x.square().sum(1) + 1)
    torch.testing.assert_close(found, expected.detach())
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert weight.grad is None


def test_norms_of_a_network_are_those_of_backward_on_each_sample_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(1, 4, 3)
        model = nn.Sequential(
            first, nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 3)
        ).double()
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    model[4].bias.requires_grad_(False)
    first.weight.grad = torch.ones_like(first.weight)
    with untouched_global_generators():
        found = per_sample_gradient_norms(model(images).square().mean(1), model.parameters())
    assert bool((first.weight.grad == 1).all())
    for image, norm in zip(images, found, strict=True):
        model.zero_grad()
        model(image[None]).square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) == 5
        expected = sum(float(g.square().sum()) for g in gradients)
        assert float(norm) == pytest.approx(expected, rel=1e-5)


def test_parameters_that_a_loss_does_not_use_add_nothing() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    found = per_sample_gradient_norms(used * torch.tensor([3.0, 4.0]), [used, unused])
    assert found.tolist() == [9.0, 16.0]
    other = per_sample_gradient_norms(used * 2.0, [unused])
    assert other.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("wrong", ["shape", "graph", "frozen"])
def test_what_cannot_be_differentiated_is_refused(wrong: str) -> None:
    weight = torch.ones(3, requires_grad=True)
    losses = {"shape": weight[None] * 2, "graph": torch.ones(3), "frozen": weight * 2}[wrong]
    parameters = [torch.ones(3)] if wrong == "frozen" else [weight]
    with pytest.raises(ValueError, match=r"gradient norms need losses \(N,\) with their graph"):
        per_sample_gradient_norms(losses, parameters)


# -- who is told -----------------------------------------------------------------------------------


def test_samplers_that_want_norms_are_found_inside_others() -> None:
    wanted, second = _sampler(), _sampler()
    assert list(gradient_norm_samplers(wanted)) == [wanted]
    assert list(gradient_norm_samplers(_sampler(mode="loss"))) == []
    assert list(gradient_norm_samplers(DensityTimestepSampler(SCHEDULERS["sd"]()))) == []
    curriculum = CurriculumTimestepSampler(wanted, clusters=3)
    assert list(gradient_norm_samplers(curriculum)) == [wanted]
    sequence = SequenceTimestepSampler(
        [{"until": 5, "sampler": curriculum}, {"until": None, "sampler": second}]
    )
    assert list(gradient_norm_samplers(sequence)) == [wanted, second]


def test_norms_are_refused_where_losses_are_learned_from() -> None:
    with pytest.raises(ValueError, match="mode='loss' learns from observe"):
        _sampler(mode="loss").observe_gradients(torch.arange(3), torch.ones(3), 0)
    with pytest.raises(ValueError, match=r"mode='hessian' is unknown: choose from gradients"):
        _sampler(mode="hessian")
    with pytest.raises(ValueError, match="one loss per index"):
        _sampler().observe_gradients(torch.arange(3), torch.ones(2), 0)


def test_norms_that_never_come_are_asked_for_once(caplog: pytest.LogCaptureFixture) -> None:
    def run(sampler: GradientNormTimestepSampler, start: int = 0) -> int:
        caplog.clear()
        for step in range(start, start + 40):
            sampler.observe(torch.arange(10), torch.ones(10), step)
        return sum("no gradient norms were passed" in r.message for r in caplog.records)

    settings = {"warm_up": 10, "refresh_every": 5}
    with caplog.at_level(logging.WARNING):
        assert run(_sampler(**settings)) == 1
        assert run(_sampler(**settings, mode="loss")) == 0
        fed = _sampler(**settings)
        fed.observe_gradients(torch.arange(10), torch.ones(10), 0)
        assert run(fed) == 0
        resumed = _sampler(**settings)
        resumed.load_state_dict(fed.state_dict())
        assert run(resumed, start=40) == 0


def test_states_with_norms_resume_exactly() -> None:
    def run(sampler: GradientNormTimestepSampler, steps: range) -> torch.Tensor:
        drawn = []
        for step in steps:
            drawn.append(sampler.sample(16, step=step).indices)
            if step % 4 == 0:
                sampler.observe_gradients(drawn[-1], (drawn[-1] % 7 + 1).float(), step)
            sampler.observe(drawn[-1], torch.ones(16), step)
        return torch.cat(drawn)

    settings = {"warm_up": 10, "refresh_every": 5, "min_observations": 1}
    first, second = _sampler(**settings), _sampler(**settings)
    run(first, range(33))
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(first, range(33, 100)), run(second, range(33, 100)))
    assert bool(first.metrics()["law_is_learned"])
