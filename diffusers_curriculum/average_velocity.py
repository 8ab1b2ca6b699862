"""Average velocities of flow matching: MeanFlow (arXiv 2505.13447)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diffusers_curriculum.objective import Objective


class Interval(NamedTuple):
    """What lies between the two times of each sample of a batch.

    Attributes:
        length: (B,) float32 t - r, the noise fraction that is gone through; 0 for a time alone.
        longer: (M,) int64 positions of the samples whose interval has a length.
        scale: of the timesteps for a noise fraction of 1.
    """

    length: Tensor
    longer: Tensor
    scale: float


@dataclass(frozen=True)
class AverageVelocity(Objective):
    """Flow matching of the average velocity u(z, r, t) between two times r <= t.

    u is 1 / (t - r) times the integral of the velocity v over r..t along the flow's path through
    z at t, so that z - (t - r) u is where the path was at r: from noise to data in one step. Its
    derivative along the path gives what to predict, u = v - (t - r) du/dt (eq. 6), and the noise
    less the data stands for v. At r = t it is flow matching.

    Args:
        levels: the noise levels, of flow matching.
        power: p of the weight 1 / (|u - target|^2 + 1e-3)^p of each sample's loss, which takes the
            place of its mean (section 4.3); 0: none.

    Raises:
        ValueError: another prediction type than "flow".
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction_type != "flow":
            raise ValueError(
                f"an average velocity is that of flow matching, and prediction_type is "
                f"{self.prediction_type!r}: take a FlowMatchEulerDiscreteScheduler."
            )

    def average(
        self,
        network: Callable[[Tensor, Tensor, Tensor], Tensor],
        noisy: Tensor,
        velocity: Tensor,
        timesteps: Tensor,
        interval: Interval,
    ) -> Tensor:
        """(B, ...) the target v - (t - r) du/dt, without a gradient.

        The derivative is that of a network at (z, t, t - r) in the direction (v, 1, 1), and of the
        samples whose times differ alone.

        Args:
            network: ``(noisy, timesteps, positions) -> prediction`` of the samples at ``positions``
                of the batch; without a wrapper that synchronises processes.
            noisy, velocity: (B, ...) the input, and noise less data.
            timesteps: (2, B) as drawn.
            interval: of the draw.
        """
        longer = interval.longer
        if len(longer) == 0:
            return velocity
        times, direction = timesteps[:, longer], velocity[longer]
        rate = forward_derivative(
            lambda z, told: network(z, told, longer),
            (noisy[longer], times),
            (direction.to(noisy.dtype), torch.full_like(times, interval.scale)),
        )
        passed = interval.length[longer].view((-1,) + (1,) * (velocity.ndim - 1))
        return velocity.index_copy(0, longer, (direction - passed * rate).to(velocity.dtype))

    def loss(
        self,
        prediction: Tensor,
        target: Tensor,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        per_token: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if self.power == 0:
            return super().loss(prediction, target, weights, mask, per_token)
        means = super().loss(prediction, target, mask=mask, per_token=per_token)[1]
        numbers = target.numel() / means.numel()  # that each is the mean of
        adaptive = numbers * (numbers * means + 1e-3).pow(-self.power)
        weights = adaptive if weights is None else weights * adaptive
        return super().loss(prediction, target, weights, mask, per_token)


def forward_derivative(
    function: Callable[..., Tensor], at: Sequence[Tensor], direction: Sequence[Tensor]
) -> Tensor:
    """The derivative of a network along a direction, in one forward pass and without a graph of it.
    (torch.func.jvp gives the same, but copies the numbers in a network's code to the device, for
    which the host waits.)"""
    # the other kernels of attention have no forward derivative
    attention = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), attention, _ContiguousGroups(), forward_ad.dual_level():
        told = (forward_ad.make_dual(*pair) for pair in zip(at, direction, strict=True))
        output = forward_ad.unpack_dual(function(*told))
    return torch.zeros_like(output.primal) if output.tangent is None else output.tangent


class _ContiguousGroups(TorchFunctionMode):
    """That of group_norm takes a direction that is contiguous in memory only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.group_norm:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))
