"""The average velocity is the integral of the velocity, on mixtures whose velocity is known."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffusers_curriculum import NoiseLevels
from diffusers_curriculum.average_velocity import AverageVelocity, Interval
from diffusers_curriculum.objective import Objective
from tests.floors_fixtures import SCHEDULERS

STEPS = 5000
MEANS, STD, SCALE = torch.tensor([-1.0, 0.5, 1.0]).double(), 0.5, 1000.0
LEVELS = NoiseLevels.from_scheduler(FlowMatchEulerDiscreteScheduler())


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """E[noise - data | z, t] of the mixture, z and t (B,)."""
    alpha, variance = 1 - t, (1 - t).square() * STD**2 + t.square()
    off = z[:, None] - alpha[:, None] * MEANS
    share = torch.softmax(-off.square() / (2 * variance[:, None]), -1)
    gain = (t - alpha * STD**2) / variance
    return (share * (gain[:, None] * off - MEANS)).sum(-1)


def average(z: Tensor, t: Tensor, length: Tensor, steps: int = 100) -> Tensor:
    """The integral of the velocity along its path from t back to t - length, over the length, by
    the classical method of Runge and Kutta."""
    h, x = -length / steps, z
    for i in range(steps):
        at = t + i * h
        k1 = velocity(x, at)
        k2 = velocity(x + h / 2 * k1, at + h / 2)
        k3 = velocity(x + h / 2 * k2, at + h / 2)
        k4 = velocity(x + h * k3, at + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return (z - x) / length


def drawn(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places, times and lengths: every other interval has none."""
    random = torch.Generator().manual_seed(0)
    t = 0.1 + 0.9 * torch.rand(count, generator=random).double()
    length = t * torch.rand(count, generator=random).double()
    length[::2] = 0
    data = MEANS[torch.randint(3, (count,), generator=random)]
    noise, own = torch.randn(2, count, generator=random).double()
    return (1 - t) * (data + STD * own) + t * noise, t, length


def interval(length: Tensor) -> Interval:
    return Interval(length, length.nonzero().flatten(), SCALE)


def test_the_true_average_is_its_own_target() -> None:
    z, t, length = drawn(64)

    def network(noisy: Tensor, told: Tensor, where: Tensor) -> Tensor:
        assert torch.equal(where, length.nonzero().flatten())
        at, lengths = told / SCALE
        return average(noisy[:, 0], at, lengths)[:, None]

    told = torch.stack([t, length]) * SCALE
    target = AverageVelocity(LEVELS).average(
        network, z[:, None], velocity(z, t)[:, None], told, interval(length)
    )[:, 0]
    assert torch.equal(target[::2], velocity(z, t)[::2])
    expected = average(z, t, length)[1::2]
    assert (target[1::2] - expected).abs().max() < 1e-6
    # which is no velocity
    assert (velocity(z, t)[1::2] - expected).abs().mean() > 0.05


class Told(nn.Module):
    """Of (z, t, length) in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 64, 1)
        layers = [nn.Linear(*ends) for ends in pairwise(widths)]
        self.net = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    def forward(self, noisy: Tensor, told: Tensor, where: Any = None) -> Tensor:
        return self.net(torch.cat([noisy, told.T / SCALE], 1))


@pytest.mark.slow
def test_a_network_learns_the_integral() -> None:
    """By the target alone, which knows no integral; and from velocities, as samples give them."""
    torch.manual_seed(0)
    network, objective = Told().double(), AverageVelocity(LEVELS, power=0.0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    z, t, length = drawn(4096)
    v, told = velocity(z, t)[:, None], torch.stack([t, length]) * SCALE
    for step in range(STEPS):
        part = torch.arange(512) + 512 * (step % 8)
        some = told[:, part]
        target = objective.average(network, z[part, None], v[part], some, interval(length[part]))
        loss, _ = objective.loss(network(z[part, None], some), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        error = network(z[:, None], told)[1::2, 0] - average(z, t, length)[1::2]
    assert error.square().mean() < 1e-3


def test_each_loss_weighs_its_own_inverse() -> None:
    """1 / (squared error + 0.001)^p; what is observed is the mean squared error, as ever."""
    prediction = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    target, weights = torch.zeros(3, 2), torch.tensor([1.0, 3.0, 5.0])
    for power in (0.0, 0.5, 1.0):
        loss, losses = AverageVelocity(LEVELS, power).loss(prediction, target, weights)
        squares = torch.tensor([1.0, 4.0, 0.0])
        factor = (squares + 1e-3) ** -power * (2 if power else 1)
        assert torch.allclose(loss, (weights * factor * squares / 2).mean())
        assert torch.equal(losses, squares / 2)
        (gradient,) = torch.autograd.grad(loss, prediction)
        assert torch.allclose(gradient, (weights * factor)[:, None] * prediction.detach() / 3)
        # tokens of one number each weigh theirs
        each, of_tokens = AverageVelocity(LEVELS, power).loss(prediction, target, per_token=True)
        assert torch.equal(of_tokens, prediction.detach().square())
        assert torch.allclose(each, (of_tokens * (of_tokens + 1e-3) ** -power).mean())
    plain = Objective(LEVELS).loss(prediction, target, weights)[0]
    assert torch.equal(AverageVelocity(LEVELS, 0.0).loss(prediction, target, weights)[0], plain)


def test_what_is_no_flow_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type is 'epsilon'"):
        AverageVelocity(NoiseLevels.from_scheduler(SCHEDULERS["sd"]()))
