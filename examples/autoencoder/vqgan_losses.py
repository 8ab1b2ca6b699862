"""What the autoencoder is trained on, and its critic."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from diffusers_curriculum.models.discriminator import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from diffusers_curriculum.models.reconstruction import PerceptualDistance, logit_laplace_loss
from diffusers_curriculum.randomness import key
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.checkpoint.optimizer import (
    load_optimizer_state,
    optimizer_state,
    own_numbers,
)
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop.guard import FiniteGuard

Losses = dict[str, Tensor]


class ReconstructionLoss:
    """The weighted distances of a reconstruction to its image.

    Raises:
        UsageError: the perceptual model cannot be loaded.
    """

    def __init__(self, args: Arguments, device: torch.device) -> None:
        self.l2, self.laplace = args.l2_weight, args.logit_laplace_weight
        self.perceptual, self.distance = args.perceptual_weight, None
        if args.perceptual_model is not None:
            try:
                found = PerceptualDistance.from_pretrained(args.perceptual_model, args.cache_dir)
            except ValueError as error:
                raise UsageError(f"--perceptual_model: {error}") from error
            self.distance = found.to(device)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the distances."""
        used = {"l2": True, "logit_laplace": self.laplace, "perceptual": self.distance is not None}
        return tuple(name for name, is_used in used.items() if is_used)

    def __call__(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, Losses]:
        """Their weighted sum (), and each of them without its weight; float32."""
        parts = {"l2": mse_loss(reconstruction.float(), images)}
        total = self.l2 * parts["l2"]
        if self.laplace:
            parts["logit_laplace"] = logit_laplace_loss(reconstruction, images)
            total = total + self.laplace * parts["logit_laplace"]
        if self.distance is not None:
            parts["perceptual"] = self.distance(reconstruction, images)
            total = total + self.perceptual * parts["perceptual"]
        return total, {name: part.detach() for name, part in parts.items()}


class Adversary:
    """The critic with its optimizer; it computes in float32, whatever the mixed precision.

    It is the same on every process: its gradients are averaged here, because
    DistributedDataParallel does not go with the second derivatives of the penalty.

    Raises:
        UsageError: a resolution that it cannot halve.
    """

    def __init__(self, args: Arguments, accelerator: Any, seed: int) -> None:
        self.args, self.accelerator = args, accelerator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, purpose="discriminator") >> 65)
            try:
                model = Discriminator(args.resolution, width=args.discriminator_width)
            except ValueError as error:
                raise UsageError(f"{error} Or leave it out: --adversarial_weight 0.") from error
        self.model = model.to(accelerator.device)
        rate = args.discriminator_learning_rate
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=args.learning_rate if rate is None else rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=0.0,
            fused=all(p.device.type in ("cpu", "cuda") for p in parameters),
        )
        # without the gradient scaler, which knows the autoencoder's gradients only
        plain = SimpleNamespace(
            device=accelerator.device,
            num_processes=accelerator.num_processes,
            is_main_process=accelerator.is_main_process,
        )
        self.guard = FiniteGuard(plain, self.optimizer, args.nonfinite)
        self._losses: list[Tensor] = []

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """How little a reconstruction passes as real; no gradient goes to the critic."""
        self.model.requires_grad_(False)
        return generator_loss(self.model(reconstruction.float()))

    def backward(self, images: Tensor, reconstruction: Tensor, step: int) -> Losses:
        """Add one micro-batch's gradients."""
        self.model.requires_grad_(True)
        real, fake = self.model(images), self.model(reconstruction.detach().float())
        loss = discriminator_loss(real, fake)
        losses = {"discriminator": loss.detach()}
        if self.args.r1_gamma and step % self.args.r1_interval == 0:
            penalty = r1_penalty(self.model, images)
            loss = loss + self.args.r1_gamma / 2 * self.args.r1_interval * penalty
        (loss / self.args.gradient_accumulation_steps).backward()
        self._losses.append(loss.detach())
        return losses

    def step(self) -> None:
        """Update the critic from the gradients of all micro-batches and processes."""
        parameters = list(self.model.parameters())
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        self.guard.step(self._losses, norm)
        self.optimizer.zero_grad()
        self._losses = []

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and counts of faults."""
        tensors, described = optimizer_state(self.optimizer)
        return {
            "model": self.model.state_dict(),
            "moments": tensors,
            "optimizer": described,
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Continue from a saved state, with this run's learning rate.

        Raises:
            CheckpointError, RuntimeError: it is of another critic.
        """
        self.model.load_state_dict(state["model"])
        put_back = own_numbers(self.optimizer)
        load_optimizer_state(self.optimizer, state["moments"], state["optimizer"])
        put_back()
        self.guard.load_state_dict(state["guard"])


class Guards:
    """Several guards that are asked as one."""

    def __init__(self, *guards: FiniteGuard) -> None:
        self.guards = guards

    def check(self, step: int) -> int:
        """Updates left out so far, in all.

        Raises:
            NonFiniteError: as one of them does.
        """
        return sum(guard.check(step) for guard in self.guards)
