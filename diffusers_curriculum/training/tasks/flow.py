"""Training a flow-matching transformer on captions: SD3, Flux.1, Flux.2, Qwen-Image, Z-Image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_curriculum.drop_in import compute_loss_weighting_for_sd3
from diffusers_curriculum.samplers import TimestepSample
from diffusers_curriculum.training.arguments.buckets import BUCKETS
from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
from diffusers_curriculum.training.arguments.flow import ADAPTER, FLOW, SCHEME, TEXT, WEIGHTS
from diffusers_curriculum.training.arguments.noise_levels import PREDICTION, SLOWED
from diffusers_curriculum.training.arguments.run import (
    CHECKPOINTS,
    EMA,
    LATENT_CACHE,
    LOOP,
    OF_IMAGES,
    OF_MACHINE,
    OPTIMIZER,
    RUN,
    SOURCE,
    official,
)
from diffusers_curriculum.training.arguments.subjects import MASKS, PRIOR, SUBJECT
from diffusers_curriculum.training.arguments.text_to_image import (
    CAPTIONS,
    DROPOUT,
    MEMORY,
    MODEL,
    PICTURES,
    PROMPTED,
)
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.levels.formulations import pipeline_index
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.task import JobParts
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import Conditioning, ModelFamily, families
from diffusers_curriculum.training.parts.families.flow import FlowFamily, ShiftLine, Told
from diffusers_curriculum.training.publish.text_to_image import OnePromptPublisher
from diffusers_curriculum.training.tasks.family import FamilyTask, TextToImageRun

_DATA = (MODEL, SUBJECT, PRIOR, SOURCE, CAPTIONS, *OF_IMAGES, TEXT)
_TRAINING = (RUN, OPTIMIZER, SCHEME, FLOW)
_FAMILIAR = (*_DATA, *_TRAINING, PICTURES, *OF_MACHINE, CHECKPOINTS)
_PRODIGY = [f.name for f in OPTIMIZER.flags if f.name.startswith(("optimizer", "prodigy_"))]
_MEMORY = ["offload", "bnb_quantization_config_path"]
_BUCKETED = [f.name for f in BUCKETS.flags]


@dataclass(kw_only=True)
class FlowRun(TextToImageRun):
    """What the step works with."""

    family: FlowFamily
    guidance: float | None  # what the network is told, if it was distilled to be
    line: ShiftLine | None = None  # of the shift in image tokens, where sizes differ

    def at_own_size(self, drawn: TimestepSample, latents: Tensor) -> TimestepSample:
        """The same draw, with the shift that belongs to the size of these latents: log-SNR less
        2 ln(s / s0), of the shift s there and s0 at --resolution."""
        if self.line is None:
            return drawn
        shift, levels = self.line.relative(latents), self.sampler.levels.to(latents.device)
        if shift == 1.0:
            return drawn
        log_snr = levels.positions[drawn.indices] if drawn.log_snr is None else drawn.log_snr
        log_snr = log_snr - 2 * math.log(shift)
        return drawn._replace(log_snr=log_snr, timesteps=levels.conditioning(log_snr))

    def loss(
        self, prediction: Tensor, target: Tensor, weights: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, the mean of w (prediction - target)^2 in the order of
        diffusers' flow-matching scripts, and the unweighted loss (B,) of each sample."""
        squares = (prediction.float() - target.float()) ** 2
        squares = squares if mask is None else mask * squares
        weight = 1.0 if weights is None else weights.view(-1, *[1] * (squares.ndim - 1))
        each = torch.mean((weight * squares).reshape(len(squares), -1), 1)
        return each.mean(), squares.detach().reshape(len(squares), -1).mean(1)


class FlowTransformer(FamilyTask):
    """A transformer of any family of flow matching, found by the class of the pipeline."""

    family: FlowFamily

    command_line = CommandLine(
        "Fine-tune Stable Diffusion 3, Flux, Qwen-Image or Z-Image with a timestep curriculum and "
        "importance sampling.",
        (
            *_FAMILIAR,
            MASKS,
            BUCKETS,
            ADAPTER,
            LATENT_CACHE,
            MEMORY,
            DROPOUT,
            EMA,
            PREDICTION,
            *NOISE_LEVELS,
            SLOWED,
            LOOP,
        ),
        official=f"{official(_FAMILIAR)} {' '.join(_MEMORY + _PRODIGY + _BUCKETED)}",
        changes={
            "output_dir": {"default": "flow-model-finetuned"},
            "tracker_project_name": {"default": "flow-fine-tune"},
            "flow_shift": {
                "default": None,
                "help": "shift of the noise levels (default: what the family is trained with at "
                "this resolution, docs/adding_a_family.md; 1: diffusers' scripts for Flux and "
                "Qwen-Image)",
            },
            "train_batch_size": {"default": 4},
            "num_train_epochs": {"default": 1},
            "adam_weight_decay": {"default": 1e-4},
            "lr_num_cycles": {"default": 1, "later": False},
            "lr_power": {"default": 1.0, "later": False},
            "validation_epochs": {"default": 50},
            "validation_steps": {"needs": (PROMPTED,)},
        },
    )

    def family_of(self, args: Arguments) -> ModelFamily:
        name = pipeline_index(args).get("_class_name")
        known = {f.pipeline: f for f in families().values() if isinstance(f, FlowFamily)}
        if name not in known:
            raise UsageError(
                f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} is a "
                f"{name}, and this script trains one of {', '.join(sorted(known))}."
            )
        return known[name]

    def choose_levels(self, args: Arguments, seed: int) -> Levels:
        levels = Levels.of(args, *self.family_of(args).load_schedulers(args), seed)
        if args.weighting_scheme in WEIGHTS:  # diffusers' own numbers, to the last bit
            sigma = levels.objective.levels.sigma.float()
            levels.weights = compute_loss_weighting_for_sd3(args.weighting_scheme, sigma)
        return levels

    def publisher(self, job: JobParts) -> OnePromptPublisher:
        args, family = job.args, self.family
        self.published = OnePromptPublisher(args, job.accelerator, self.levels, job.plan, family)
        return self.published

    def encode_text(self, models: Components, tokens: Mapping[str, Any]) -> Conditioning:
        return self.family.encode_text(models, tokens, _told(self.args))

    def caption_facts(self, args: Arguments) -> dict[str, Any]:
        return _told(args)._asdict()

    def make_run(self, job: JobParts, **common: Any) -> FlowRun:
        distilled = self.models.network.config.get("guidance_embeds")
        return FlowRun(
            **common,
            **self.run_parts(job),
            guidance=job.args.guidance_scale if distilled else None,
            line=self.family.shift_line(job.args) if job.args.use_aspect_ratio_buckets else None,
        )


def _told(args: Arguments) -> Told:
    return Told(args.max_sequence_length, args.text_encoder_out_layers)
