"""A loss weight that is learned beside the model: the log-variance of the loss at each log-SNR."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_curriculum.catalogue import Catalogue
from diffusers_curriculum.checks import above_zero, inside, whole
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.randomness import host_generator

LEARNED_WEIGHTINGS: Catalogue[type[LearnedLossWeights]] = Catalogue("learned loss weighting")


class UncertaintyWeighting(nn.Module):
    """EDM2's uncertainty weighting: loss e^(-z) + z with a learned z(log_snr) (arXiv
    2312.02696; NVlabs/edm2).

    z is linear in random Fourier features sqrt(2) cos(2 pi (f x + p)) of x = ln(sigma) / 4 =
    -log_snr / 8 (f normal, p uniform), scaled by 1 / sqrt(features), without a bias. Its weights
    start at 0, where the loss is the unweighted one (NVlabs/edm2: at random ones of unit norm).

    At one level the minimum over z is z* = ln E[loss], of value 1 + z*: every level ends up with
    the same mean weighted loss, 1. A fixed weighting W of the losses only adds ln W to z*.

    Train the parameters with the model, without weight decay and in float32, and drop them for
    inference. The losses must be means over the elements of a sample.

    Args:
        levels: the noise levels; one at infinite log-SNR counts as one more step of its neighbours'
            spacing away.
        features, seed: number of Fourier features, at least one, and their seed.

    Raises:
        ValueError: fewer than one feature, or more than 65536, which are kept for each level.
    """

    coordinate: Tensor
    frequencies: Tensor
    phases: Tensor

    def __init__(self, levels: NoiseLevels, *, features: int = 128, seed: int = 0) -> None:
        super().__init__()
        whole("features", features, 1, 65_536)
        rng = host_generator(seed, purpose="uncertainty features")
        frequencies, phases = rng.standard_normal(features), rng.random(features)
        self.register_buffer("frequencies", torch.from_numpy(2 * math.pi * frequencies).float())
        self.register_buffer("phases", torch.from_numpy(2 * math.pi * phases).float())
        coordinate = (-levels.positions.cpu().double() / 8).float()
        self.register_buffer("coordinate", coordinate, persistent=False)  # the levels say it
        self.weight = nn.Parameter(torch.zeros(features))

    def log_variance(self, indices: Tensor | None = None) -> Tensor:
        """z at the levels ``indices`` (B,), by default at all of them, in float32; ValueError where
        the module was cast to another dtype."""
        if self.weight.dtype != torch.float32:
            raise ValueError(
                f"the uncertainty weighting was cast to {self.weight.dtype}, where z loses its "
                "digits: keep it in float32 and leave mixed precision to autocast."
            )
        at = self.coordinate if indices is None else self.coordinate[indices]
        # no matmul, which autocast would carry out in half precision
        features = math.sqrt(2) * torch.cos(at[:, None] * self.frequencies + self.phases)
        return (features * self.weight).sum(1) / math.sqrt(len(self.weight))

    def forward(self, losses: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """What to average and differentiate, and z.

        Args:
            losses: (B,) mean squared error of each sample, already times a fixed weight if any.
            indices: (B,) int64, position of each sample's noise level, 0 = cleanest.

        Returns:
            (B,) float32 loss e^(-z) + z, and (B,) float32 z.

        Raises:
            ValueError: losses and indices of different shapes.
        """
        if losses.shape != indices.shape:
            raise ValueError(
                f"losses {tuple(losses.shape)} and indices {tuple(indices.shape)} must both have "
                "shape (batch,): reduce the squared errors to one mean per sample."
            )
        z = self.log_variance(indices)
        return losses.float() * torch.exp(-z) + z, z


@LEARNED_WEIGHTINGS.register(
    "uncertainty",
    formula="e^-z, z(l) learned by minimising loss e^-z + z",
    source="arXiv 2312.02696; NVlabs/edm2",
    note="every level ends up with the same weighted loss, unless its loss is below the floor, as "
    "weights are at most 1000 (17.5 % of the levels of linear betas, exact epsilon losses of unit "
    "data); cancels any fixed weighting",
)
class LearnedLossWeights:
    """Trains an :class:`UncertaintyWeighting` beside a model, from the losses that a step observed.

    The gradient of mean(loss e^(-z) + z) by z needs the values of the losses only, and that by the
    network is e^(-z) times its own: hence weights e^(-z) for the network's step, and a step of
    AdamW on z afterwards, with the global batch that every process has, are the joint training of
    arXiv 2312.02696. Nothing is read back to the host.

    Args:
        learning_rate: of z, without decay (this library's default).
        warm_up: optimizer steps in which z learns, and the weights stay 1.
        floor: the weights lie in [floor, 1 / floor], greater than 0 and at most 1: levels whose
            loss is below it weigh less than the others.
        features, seed: see :class:`UncertaintyWeighting`.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        levels: NoiseLevels,
        *,
        learning_rate: float = 0.01,
        warm_up: int = 0,
        floor: float = 0.001,
        features: int = 128,
        seed: int = 0,
    ) -> None:
        above_zero("learning_rate", learning_rate)
        whole("warm_up", warm_up)
        inside("floor", floor, 0, 1, "(]")
        self.uncertainty = UncertaintyWeighting(levels, features=features, seed=seed)
        self.optimizer = torch.optim.AdamW(
            self.uncertainty.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        weight = self.uncertainty.weight
        self.optimizer.state[weight] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
        self.warm_up, self.floor = warm_up, float(floor)

    def weights(self, step: int, device: torch.device | str = "cpu") -> Tensor:
        """(T,) float32 weights for optimizer step ``step``, without a gradient."""
        z = self.uncertainty.to(device).log_variance().detach()
        if step < self.warm_up:
            return torch.ones_like(z)
        return torch.exp(-z).clamp(self.floor, 1 / self.floor)

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """One step of z by the unweighted losses (N,) at the levels ``indices`` (N,) of the global
        batch; a non-finite loss is no observation, and without any nothing changes."""
        finite = losses.isfinite()
        self._move(losses.device)
        both, _ = self.uncertainty(losses.nan_to_num(0, 0, 0), indices)
        (both.where(finite, 0.0).sum() / finite.sum().clamp_min(1)).backward()
        before = [tensor.detach().clone() for tensor in self._changing()]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seen = finite.any()
        for tensor, old in zip(self._changing(), before, strict=True):
            tensor.detach().copy_(torch.where(seen.to(tensor.device), tensor.detach(), old))

    def _changing(self) -> list[Tensor]:
        """What a step changes: z's weights, their moments, the count of steps."""
        weight = self.uncertainty.weight
        return [weight, *self.optimizer.state[weight].values()]

    def _move(self, device: torch.device) -> None:
        """Take what changes to where the losses are; the count of steps where CUDA keeps it."""
        weight, on_cuda = self.uncertainty.to(device).weight, device.type == "cuda"
        self.optimizer.param_groups[0]["capturable"] = on_cuda
        places = {"step": device if on_cuda else torch.device("cpu")}
        state = self.optimizer.state[weight]
        for name, value in state.items():
            state[name] = value.to(places.get(name, device))

    def state_dict(self) -> dict[str, Tensor]:
        """z's parameters and its moments; copies on the CPU."""
        moments = self.optimizer.state[self.uncertainty.weight]
        held = self.uncertainty.state_dict() | {f"adam.{k}": v for k, v in moments.items()}
        return {name: value.detach().cpu().clone() for name, value in held.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, with the next weights of the object it came from; RuntimeError for one
        of other features."""
        own = {k: torch.as_tensor(v) for k, v in state.items() if not k.startswith("adam.")}
        self.uncertainty.load_state_dict(own)
        moments = {k[5:]: torch.as_tensor(v) for k, v in state.items() if k.startswith("adam.")}
        for name, value in moments.items():
            self.optimizer.state[self.uncertainty.weight][name].copy_(value)
