"""The law of least gradient variance."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_curriculum.checks import checked, one_of
from diffusers_curriculum.samplers.adaptive import AdaptiveTimestepSampler
from diffusers_curriculum.samplers.base import SAMPLERS, TimestepSampler

logger = logging.getLogger(__name__)


@SAMPLERS.register(
    "gradient_norm",
    formula="p(t) ~ W sqrt(E|grad loss|^2)",
    source="least variance, by the Cauchy-Schwarz inequality",
    note="learns from observe_gradients(), or from observe() with mode='loss'",
)
class GradientNormTimestepSampler(AdaptiveTimestepSampler):
    """p proportional to q W sqrt(E||grad loss||^2) per timestep: of all laws, the one whose
    importance corrected gradient has the least variance (by the Cauchy-Schwarz inequality), q the
    uniform law.

    Optimal for one step of plain gradient descent; what it brings under Adam is to be measured.

    Args:
        mode: "gradients": from squared gradient norms that the caller estimates now and then and
            passes to :meth:`observe_gradients`; or "loss": with E[loss] in place of the squared
            norm, which for a squared error is in proportion where the network's Jacobian is as
            large at all levels.
        importance_correction: "full", without which it is no variance that is least.

    The other arguments, and errors, are those of :class:`AdaptiveTimestepSampler`; all defaults are
    this library's. Few bins by default, as norms are few.
    """

    mode: str = checked(one_of, ("gradients", "loss"), default="gradients")
    min_observations = 4
    most_bins: ClassVar[int] = 16

    def __post_init__(self, scheduler: Any) -> None:
        super().__post_init__(scheduler)
        self._gradients_at = -1  # step of the last norms
        self._may_warn = True

    @classmethod
    def from_losses(cls, scheduler: Any, **config: Any) -> AdaptiveTimestepSampler:
        settings: dict[str, Any] = {"mode": "loss"} | config
        return cls(scheduler, **settings)

    def _scale(self) -> Tensor:
        return self._weights()  # and not its square, which differs more within a bin

    def _rule(self, profile: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        return (constants["weights"] * profile).sqrt()

    def observe(self, indices: Tensor, losses: Tensor, step: int) -> None:
        """As :meth:`AdaptiveTimestepSampler.observe` in mode "loss"; in mode "gradients" the losses
        only tell that the step is over."""
        late = step >= self.warm_up + self.refresh_every
        if self.mode == "loss":
            self._add(indices, losses)
        elif late and self._may_warn and self._gradients_at < 0:
            logger.warning(
                "no gradient norms were passed to observe_gradients() in %d steps: levels are "
                "still drawn from the warm-up density; pass some, or use mode='loss'.",
                step,
            )
            self._may_warn = False
        self._end_step(step)

    def observe_gradients(self, indices: Tensor, squared_norms: Tensor, step: int) -> None:
        """Add squared gradient norms of single samples' unweighted losses, those of all processes;
        call :meth:`observe` for the same step afterwards.

        Args:
            indices: (N,) levels of the samples.
            squared_norms: (N,) as of :func:`per_sample_gradient_norms`.
            step: the optimizer step they were estimated at.

        Raises:
            ValueError: mode "loss", or not one number per index.
        """
        if self.mode != "gradients":
            raise ValueError(
                f"mode={self.config['mode']!r} learns from observe() alone: build the sampler with "
                "mode='gradients' for gradient norms."
            )
        self._add(indices, squared_norms)
        self._gradients_at = step

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"gradients_at": self._gradients_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._gradients_at = int(state["gradients_at"])


def per_sample_gradient_norms(losses: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """(N,) float32 squared norm of the gradient of each sample's loss, over all parameters.

    One backward pass per sample through the one graph of ``losses``, which it frees; gradients in
    ``.grad`` stay as they are. Pass a few samples, now and then; a part of the parameters (such as
    the last layers') is cheaper. The model must treat its samples apart (no batch norm), and not be
    wrapped for several processes.

    Args:
        losses: (N,) unweighted losses, one per sample, with their graph.
        parameters: of the model; those without gradient are left out.

    Raises:
        ValueError: losses of another shape or without a graph, or no parameter to differentiate.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if losses.ndim != 1 or not losses.requires_grad or not wanted:
        raise ValueError(
            f"gradient norms need losses (N,) with their graph and trainable parameters: got shape "
            f"{tuple(losses.shape)}, requires_grad={losses.requires_grad} and {len(wanted)} such "
            "parameters."
        )
    rows = losses.unbind()
    norms = []
    for number, loss in enumerate(rows, 1):
        gradients = torch.autograd.grad(
            loss, wanted, retain_graph=number < len(rows), allow_unused=True
        )
        norms.append(sum(g.float().square().sum() for g in gradients if g is not None))
    return torch.stack([torch.as_tensor(n, device=losses.device).float() for n in norms])


def gradient_norm_samplers(sampler: TimestepSampler) -> Iterator[GradientNormTimestepSampler]:
    """The samplers inside ``sampler`` (a curriculum's base, a sequence's phases, itself) that
    :meth:`~GradientNormTimestepSampler.observe_gradients` is to be called on."""
    for each in sampler.walk():
        if isinstance(each, GradientNormTimestepSampler) and each.mode == "gradients":
            yield each
