"""What class-conditional and unconditional training have in common: a DiT or U-Net, in pixels or in
the latents of an autoencoder, with diffusion, flow matching or EDM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_curriculum.average_velocity import AverageVelocity
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.models.networks import check_conditioning, null_class, takes_labels
from diffusers_curriculum.samplers import TimestepSample
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.laws import settle_log_normal, settle_logit_normal
from diffusers_curriculum.training.data.decoding import MODES
from diffusers_curriculum.training.errors import UsageError, usage_errors
from diffusers_curriculum.training.levels.formulations import (
    build_schedulers,
    formulation_of,
    sigma_data_of,
)
from diffusers_curriculum.training.levels.intervals import with_intervals
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.run import LevelRun
from diffusers_curriculum.training.loop.task import JobParts, Trained
from diffusers_curriculum.training.parts import images as parts
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.process.runtime import frozen_dtype
from diffusers_curriculum.training.publish.images import ImagePublisher
from diffusers_curriculum.training.tasks.generated_images import GeneratedImageTask
from diffusers_curriculum.training.tasks.levels import check_slowed
from diffusers_curriculum.weighting.variational import VariationalBound


@dataclass(kw_only=True)
class ImageRun(LevelRun):
    """What the step works with."""

    space: LatentSpace  # what is trained in
    null_label: int | None  # the class that stands for none; None for a network without labels

    def encoded(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of a batch's latents: encoded now, or taken from the cache."""
        if "pixel_values" in batch:
            return self.space.encode(batch["pixel_values"])
        return batch["mean"], batch.get("std")

    def average_velocity(
        self,
        noisy: Tensor,
        velocity: Tensor,
        conditioning: Mapping[str, Tensor],
        drawn: TimestepSample,
    ) -> Tensor:
        """What the network should predict for intervals: see :meth:`AverageVelocity.average`."""
        network, objective = self.weights, self.objective
        if drawn.interval is None or not isinstance(objective, AverageVelocity):
            return velocity

        def predict(latents: Tensor, timesteps: Tensor, where: Tensor) -> Tensor:
            told = {name: values[where] for name, values in conditioning.items()}
            output = network(latents, timesteps, **told, return_dict=False)[0]
            return output[:, : latents.shape[1]]

        with self.accelerator.autocast():
            return objective.average(predict, noisy, velocity, drawn.timesteps, drawn.interval)


class ImageTask(GeneratedImageTask):
    """A network of images, from its config or from a saved pipeline."""

    default_vp: ClassVar[str]  # scheduler class for sampling a variance preserving process
    average_warmup: ClassVar[tuple[str, ...]] = ()  # flags of the average's warm-up, without ema_
    formulation: str = "ddpm"

    @property
    def guidance_scale(self) -> float | None:
        """Of classes; None without them."""
        return None

    @property
    def drawing_facts(self) -> dict[str, Any]:
        steps = self.args.eval_num_inference_steps
        return {"inference_steps": steps, "guidance_scale": self.guidance_scale}

    # -- the command line ------------------------------------------------------------------------

    def settle(self, args: Arguments) -> None:
        """The formulation is that of the pretrained pipeline, ddpm without one. EDM draws
        log-normally without a floor, as its paper does, unless a sampler or a floor is given; so
        does MeanFlow logit-normally, and its images take one step."""
        if args.formulation is None and args.pretrained_model_name_or_path is not None:
            args.formulation = formulation_of(args)
        self.formulation = args.formulation = args.formulation or "ddpm"
        by_flag = "timestep_sampler" in args.given - args.by_recipe
        by_flag = by_flag or args.timestep_bias_strategy != "none"
        if args.formulation == "edm" and not by_flag:
            settle_log_normal(args, sigma_data_of(args))
        if args.formulation == "mean_flow" and not by_flag:
            settle_logit_normal(args)
        for steps in ("validation_inference_steps", "eval_num_inference_steps"):
            if args.formulation == "mean_flow" and steps not in args.given:
                setattr(args, steps, 1)

    def check_engine(self, sharded: bool) -> None:
        if sharded and self.formulation == "mean_flow":
            raise UsageError(
                "--formulation mean_flow: the derivative of a network that lies in the shards of "
                "FSDP2 is not known: train it by plain data parallelism (unset "
                "ACCELERATE_USE_FSDP)."
            )

    # -- what is trained on ----------------------------------------------------------------------

    def choose_levels(self, args: Arguments, seed: int) -> Levels:
        pixels = parts.autoencoder_source(args) is None
        if pixels and args.cache_latents:
            raise UsageError(
                "--cache_latents has no effect in pixels: give "
                "--pretrained_vae_model_name_or_path, or drop it."
            )
        schedulers = build_schedulers(args, pixels=pixels, default_vp=self.default_vp)
        levels = Levels.of(args, *schedulers, seed, continuous=not args.discrete_timesteps)
        check_slowed(args, levels)
        if args.formulation == "mean_flow":
            levels = with_intervals(args, levels)
        if args.learned_variance == "vlb":
            with usage_errors("--learned_variance vlb"):
                table = levels.objective.levels
                levels.bound = VariationalBound(table, bins=256 if pixels else None)
        return levels

    def choose(self, args: Arguments, seed: int) -> None:
        super().choose(args, seed)
        self.mode = MODES[parts.colours(args)]
        parts.check_network(args, labelled=bool(self.text_columns))

    def model_facts(self, args: Arguments) -> dict[str, Any]:
        return parts.model_facts(args, self.classes)

    def publisher(self, job: JobParts) -> ImagePublisher:
        self.published = ImagePublisher(
            job.args, job.accelerator, self.levels, job.plan, seed=job.seed, id2label=self.id2label
        )
        return self.published

    # -- models ----------------------------------------------------------------------------------

    def load(self, job: JobParts) -> Trained:
        args, accelerator = job.args, job.accelerator
        # what is encoded once is encoded in full
        dtype = torch.float32 if args.cache_latents else frozen_dtype(accelerator)
        space, empty, load = self.spaces(accelerator.device, dtype)
        network = parts.make_network(args, empty, self.classes, job.seed)
        with usage_errors("--formulation"):
            check_conditioning(network, self.levels.sampler.levels.timesteps)
        if args.cache_latents:
            encoder = SimpleNamespace(encode=lambda pixels: load().encode(pixels))
            self.latents = self.cached_latents(job, encoder, parts.autoencoder_identity(args))
        parts.ready(args, network, accelerator.device)
        warmup = {name: args[f"ema_{name}"] for name in self.average_warmup}
        warmup |= {"use_ema_warmup": True} if warmup else {}
        averages = (
            Averages(network).with_ema(args, accelerator.device, warmup=warmup).with_power(args)
        )
        self.models = parts.ImageModels(network, space, empty, parts.open_autoencoder(args))
        self.published.models, self.published.averages = self.models, averages
        self.make_evaluator(job)
        return Trained(network, parts.folder_name(network), averages)

    @property
    def null_label(self) -> int | None:
        """The class that stands for none; None for a network without labels."""
        network = self.models.network
        return null_class(network) if takes_labels(network) else None

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.models.space.encode(pixels)

    def make_run(self, job: JobParts, **common: Any) -> ImageRun:
        space = self.models.space
        return ImageRun(**common, levels=self.levels, space=space, null_label=self.null_label)

    def described(self, job: JobParts) -> dict[str, Any]:
        return {
            "classes": self.classes,
            "space": f"{self.models.space.kind} ({self.mode})",
            "network": type(self.models.network).__name__,
            "formulation": job.args.formulation,
        }
