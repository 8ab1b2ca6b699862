"""Training a causal language model on the codes of images: the second stage of ViT-VQGAN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffusers_curriculum.models.code_space import CodeSpace
from diffusers_curriculum.models.image_tokens import ImageTokenTransformer
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.models.loading import load_model
from diffusers_curriculum.randomness import key
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.arguments.image_tokens import COMMAND_LINE, has_probe
from diffusers_curriculum.training.data.plan import InOrder
from diffusers_curriculum.training.errors import OF_CONFIGS, UsageError, usage_errors
from diffusers_curriculum.training.evaluation.code_loss import CodeLoss
from diffusers_curriculum.training.evaluation.linear_probe import LinearProbe
from diffusers_curriculum.training.levels.levels import Levels
from diffusers_curriculum.training.loop.run import LevelLosses, LevelRun
from diffusers_curriculum.training.loop.task import JobParts, Trained
from diffusers_curriculum.training.parts import images as parts
from diffusers_curriculum.training.parts.averages import Averages
from diffusers_curriculum.training.publish.image_tokens import TokenPublisher
from diffusers_curriculum.training.storage.fingerprints import model_identity
from diffusers_curriculum.training.tasks.generated_images import GeneratedImageTask
from diffusers_curriculum.training.tasks.image_levels import Measure

FOLDER = "transformer"  # of the network, in pipelines and checkpoints


@dataclass(kw_only=True)
class ImageTokenRun(LevelRun):
    """What the step works with.

    The levels of position i of N are those of flow matching with i / N of the data known: index
    N - 1 - i, the noisiest for the first code, of which nothing is known.
    """

    space: CodeSpace

    def codes(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The codes (B, N) of a batch in raster order: encoded now, or taken from the cache."""
        if "pixel_values" in batch:
            return self.space.encode(batch["pixel_values"]).flatten(1)
        return batch["mean"].flatten(1).long()

    def position_weights(self, step: int) -> Tensor:
        """(n,) float32 what the loss of each position weighs in an image's: all N positions, or the
        first n where the law leaves the others out."""
        device = self.accelerator.device
        # the expected loss of a position that is drawn
        law, importance = self.sampler.probabilities, self.sampler.importance
        weights = law(step, device) * importance(step, device)
        if self.levels.weights is not None:
            weights = weights * self.levels.weights
        weights = weights.flip(0).float()
        if self.sampler.stages > 1:  # where a curriculum may have them closed
            weights = weights[: 1 + int(weights.nonzero().max())]
        return weights

    def loss(self, logits: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What is differentiated, (), of logits (B, n, K) for codes (B, n), and the unweighted
        cross-entropies (B, n) in nats."""
        losses = cross_entropy(logits.transpose(1, 2), codes, reduction="none")
        return (losses * weights).sum(1).mean(), losses

    def outcome(self, losses: Tensor, loss: Tensor) -> LevelLosses:
        """What a step returns of the losses (B, n) of positions, and of what was differentiated."""
        last = len(self.sampler.levels) - 1
        indices = last - torch.arange(losses.shape[1], device=losses.device)
        return LevelLosses(
            indices.expand(losses.shape).reshape(-1),
            losses.detach().reshape(-1),
            loss.detach().reshape(1),
        )


class ImageTokens(GeneratedImageTask):
    """The codes of images one after another, given their class or nothing."""

    command_line = COMMAND_LINE
    validation_kind = CodeLoss
    probe: LinearProbe | None = None

    def settle(self, args: Arguments) -> None:
        args.prediction_type = args.untrained_timestep = args.snr_gamma = None

    def check(self, args: Arguments) -> None:
        if parts.autoencoder_source(args) is None:
            raise UsageError(
                "neither --pretrained_vae_model_name_or_path nor --pretrained_model_name_or_path "
                "is given: name the autoencoder whose codes are learned, such as one that "
                "train_vit_vqgan.py has left."
            )

    # -- what is trained on ----------------------------------------------------------------------

    @property
    def text_columns(self) -> Mapping[str, str]:
        labelled = self.args.class_conditional or has_probe(self.args)
        return {"label_column": self.args.label_column} if labelled else {}

    @property
    def guidance_scale(self) -> float | None:
        """Of classes; None without them."""
        return self.args.guidance_scale if self.args.class_conditional else None

    @property
    def drawing_facts(self) -> dict[str, Any]:
        names = ("temperature", "top_k", "top_p")
        return {n: self.args[n] for n in names} | {"guidance_scale": self.guidance_scale}

    def choose_levels(self, args: Arguments, seed: int) -> Levels:
        with usage_errors("--pretrained_vae_model_name_or_path"):
            empty = CodeSpace.of(parts.empty_space(args))
        _, height, width = empty.space.shape(args.resolution)
        self.codebook_size, self.positions = empty.codebook_size, height * width
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.positions)
        return Levels.of(args, scheduler, scheduler, seed)

    def model_facts(self, args: Arguments) -> dict[str, Any]:
        path = args.pretrained_model_name_or_path
        pipeline = None if path is None else model_identity(path, args.revision, args.variant)
        return {
            "classes": self.classes,
            "pipeline": pipeline,
            "network": None if path else [args.model_config or "gpt2", args.model_args],
            "autoencoder": parts.autoencoder_identity(args),
        }

    def facts(self, job: JobParts) -> dict[str, Any]:
        if job.args.class_conditional:
            self.know_classes(job)
        return super().facts(job)

    def publisher(self, job: JobParts) -> TokenPublisher:
        self.published = TokenPublisher(
            job.args, job.accelerator, self.levels, job.plan, seed=job.seed, id2label=self.id2label
        )
        return self.published

    def dataset_options(self, args: Arguments) -> dict[str, Any]:
        if not self.text_columns:
            return {}
        dropout = args.label_dropout if args.class_conditional else 0.0
        return {**self.text_columns, "label_dropout": dropout, "null_label": self.classes or 0}

    def clean(self, job: JobParts) -> None:
        """Nothing: codes have no scale."""

    # -- models ----------------------------------------------------------------------------------

    def load(self, job: JobParts) -> Trained:
        args, device = job.args, job.accelerator.device
        space, empty, load = self.spaces(device)
        self.space = CodeSpace.of(space)
        network = self._network(args, job.seed)
        if args.cache_latents:
            identity = {"codes of": parts.autoencoder_identity(args)}
            self.latents = self.cached_latents(job, _as_latents(load), identity)
        network.requires_grad_(True).train().to(device)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        averages = Averages(network).with_ema(args, device)
        source = parts.open_autoencoder(args)
        models = parts.ImageModels(network, space, empty, source)
        self.published.models, self.published.averages = models, averages
        self.make_evaluator(job)
        return Trained(network, FOLDER, averages)

    def _network(self, args: Arguments, seed: int) -> Any:
        wanted = self.codebook_size, self.positions, self.classes or 0
        if args.pretrained_model_name_or_path is None:
            with usage_errors("--model_args", OF_CONFIGS), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(key(seed, purpose="model_weights") >> 65)
                return ImageTokenTransformer(*wanted, args.model_config or "gpt2", args.model_args)
        path = args.pretrained_model_name_or_path
        with usage_errors("--pretrained_model_name_or_path", OF_CONFIGS):
            found = load_model(ImageTokenTransformer, path, args.revision, args.variant, FOLDER)
        names = "codebook_size", "num_positions", "num_classes"
        for name, value in zip(names, wanted, strict=True):
            if found.config[name] != value:
                raise UsageError(
                    f"--pretrained_model_name_or_path {path!r}: its network has {name}="
                    f"{found.config[name]}, and autoencoder and data have {value}: give others, or "
                    "train a new network."
                )
        return found

    def make_run(self, job: JobParts, **common: Any) -> ImageTokenRun:
        return ImageTokenRun(**common, levels=self.levels, space=self.space)

    def described(self, job: JobParts) -> dict[str, Any]:
        network = self.published.network.config
        return {
            "classes": self.classes,
            "codes": f"{self.positions} of {self.codebook_size}",
            "network": f"{network['model_type']} {network['model_args'] or ''}".strip(),
        }

    # -- measures --------------------------------------------------------------------------------

    def started(self, job: JobParts) -> None:
        if has_probe(job.args):
            self.probe = self._linear_probe(job)
        super().started(job)

    def measures(self, job: JobParts) -> Iterator[tuple[Measure, Callable[[int], object]]]:
        yield from super().measures(job)
        if self.probe is not None:
            yield self.probe, self.probe.evaluate

    def _linear_probe(self, job: JobParts) -> LinearProbe:
        run = self.undisturbed(job)
        rows = [
            (self.samples(run.args, rows, InOrder()), len(rows))
            for rows in (job.rows, self.held_out)
        ]
        network = run.network

        def features(batch: dict[str, Tensor]) -> Tensor:
            return network.features(run.codes(batch))

        width = network.causal_lm.config.hidden_size
        return LinearProbe(run, rows[0], rows[1], features, width)


def _as_latents(load: Callable[[], LatentSpace]) -> Any:
    """What a cache of latents encodes images with: their codes, as numbers (B, 1, h, w)."""

    def encode(pixels: Tensor) -> tuple[Tensor, None]:
        return CodeSpace.of(load()).encode(pixels)[:, None].float(), None

    return SimpleNamespace(encode=encode)
