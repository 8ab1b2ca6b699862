"""What a run leaves: the model with the scale of its latents, its figures, and a picture."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_curriculum.models.reconstruction import psnr, squared_errors
from diffusers_curriculum.models.saving import share_weights
from diffusers_curriculum.models.vector_quantiser import codebook_usage
from diffusers_curriculum.models.vit_vq import ViTVQModel
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.checks import decoded
from diffusers_curriculum.training.data.plan import BatchPlan
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.storage.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

GRID_FILE, METRICS_FILE = "reconstructions.png", "metrics.json"
_COLUMNS = 16


@dataclass(frozen=True)
class Evaluation:
    """How well images are reconstructed, and what their latents look like.

    Attributes:
        images: how many.
        psnr: mean over the images of 10 log10(peak^2 / squared error), in dB.
        psnr_of_mean_error: the same of the mean squared error; never above `psnr`.
        codebook_used: share of the codes that these images use.
        codebook_perplexity: exp of the entropy of their frequencies.
        latent_rms: root mean square of the latents' numbers: 1 / sqrt(codebook_dim).
        latent_std: root mean over channels of their variance; below the rms where means are not 0.
    """

    images: int
    psnr: float
    psnr_of_mean_error: float
    codebook_used: float
    codebook_perplexity: float
    latent_rms: float
    latent_std: float


def reconstruct(model: ViTVQModel, images: Tensor) -> tuple[Tensor, Any]:
    """Latents, and the ViTVQOutput that they are decoded to.

    In float32, as users will: accelerate has put mixed precision into the model's own forward.
    """
    encoded: Any = model.encode(images)
    decoded: Any = model.decode(encoded.latents)
    return encoded.latents, decoded


@torch.no_grad()
def evaluate(model: ViTVQModel, batches: Iterator[Tensor]) -> Evaluation:
    """Reconstruct batches of images (B, C, H, W) in [-1, 1], at least one."""
    errors: list[Tensor] = []
    config: Any = model.config
    device, channels = model.device, config.codebook_dim
    counts = torch.zeros(config.codebook_size, dtype=torch.int64, device=device)
    sums, places = torch.zeros(2, channels, dtype=torch.float64), 0
    for batch in batches:
        images = batch.to(device)
        latents, output = reconstruct(model, images)
        errors.append(squared_errors(output.sample, images).double().cpu())
        counts += torch.bincount(output.indices.flatten(), minlength=len(counts))
        numbers = latents.double().transpose(0, 1).flatten(1).cpu()
        sums += torch.stack([numbers.sum(1), numbers.square().sum(1)])
        places += numbers.shape[1]
    means, squares = sums / places
    error, usage = torch.cat(errors), codebook_usage(counts)
    return Evaluation(
        images=len(error),
        psnr=float(psnr(error).mean()),
        psnr_of_mean_error=float(psnr(error.mean())),
        codebook_used=usage.used,
        codebook_perplexity=usage.perplexity,
        latent_rms=float(squares.mean().sqrt()),
        latent_std=float((squares - means.square()).mean().sqrt()),
    )


class Results:
    """Evaluates and saves on the main process, while the others wait.

    Args:
        model: without accelerate's wrappers.
        rows: images to train on, undecoded.
        held_out: images kept apart, None for none.
        plan: the order of the rows; the first --measure_samples of them are measured.
    """

    def __init__(
        self,
        args: Arguments,
        accelerator: Any,
        model: ViTVQModel,
        rows: Dataset,
        held_out: Dataset | None,
        plan: BatchPlan,
    ) -> None:
        self.args, self.accelerator, self.model = args, accelerator, model
        self.rows, self.held_out = rows, held_out
        measured = range(min(plan.num_samples, args.measure_samples))
        self.order: Sequence[int] = [plan.index(position) for position in measured]
        self.transform = replace(ImageTransform.of(args), center_crop=True, random_flip=False)

    def is_due(self, done: int) -> bool:
        """Whether the held-out images are looked at after ``done`` steps."""
        every = self.args.validation_steps
        return every is not None and done % every == 0 and done < self.args.max_train_steps

    def validate(self, done: int) -> None:
        """Log the figures of the held-out images."""
        if self.accelerator.is_main_process and self.held_out is not None:
            batches = self._batches(self.held_out, range(len(self.held_out)))
            found = evaluate(self.model, batches)
            logger.info("step %d: %s", done, found)
            metrics = {f"validation/{name}": value for name, value in asdict(found).items()}
            self.accelerator.log(metrics, step=done)
        self.accelerator.wait_for_everyone()

    def saved(self, step: int) -> None: ...

    def finish(self) -> None:
        """Measure the latents' scale, and write the model, the figures and the picture."""
        if self.accelerator.is_main_process:
            folder, model = Path(self.args.output_dir), self.model
            model.eval()
            trained = evaluate(model, self._batches(self.rows, self.order))
            spread = {"rms": trained.latent_rms, "std": trained.latent_std}
            factor = _factor(spread[self.args.latent_scale], self.args.latent_scale)
            model.register_to_config(scaling_factor=factor)
            model.save_pretrained(folder)
            share_weights(folder, "*.safetensors")
            document: dict[str, Any] = {"step": self.args.max_train_steps, "scaling_factor": factor}
            document["training"] = asdict(trained)
            shown, order = self.rows, self.order
            if self.held_out is not None:
                shown, order = self.held_out, range(len(self.held_out))
                document["held_out"] = asdict(evaluate(model, self._batches(shown, order)))
            write_atomically(folder / METRICS_FILE, json.dumps(document, indent=2) + "\n")
            logger.info(
                "latents: rms %.5f, std %.5f, scaling_factor %.5f",
                trained.latent_rms,
                trained.latent_std,
                factor,
            )
            logger.info("%s", document.get("held_out", document["training"]))
            logger.info("model in %s", folder)
            # from all over the data, as rows are often sorted by class
            chosen = order[:: max(1, len(order) // (2 * _COLUMNS))][: 2 * _COLUMNS]
            self._picture(model, next(self._batches(shown, chosen, len(chosen))))
        self.accelerator.wait_for_everyone()

    def _batches(self, rows: Dataset, order: Sequence[int], size: int = 0) -> Iterator[Tensor]:
        size = size or int(self.args.train_batch_size)
        for start in range(0, len(order), size):
            numbers = list(order[start : start + size])
            cells = zip(rows[numbers][self.args.image_column], numbers, strict=True)
            images = (decoded(*cell, self.transform.decode) for cell in cells)
            yield torch.stack([self.transform(image, 0, 0, 1) for image in images])

    @torch.no_grad()
    def _picture(self, model: ViTVQModel, images: Tensor) -> None:
        """Originals, and below each its reconstruction."""
        _, output = reconstruct(model, images.to(model.device))
        picture = grid(images, output.sample.float().cpu())
        picture.save(Path(self.args.output_dir) / GRID_FILE)


def grid(originals: Tensor, reconstructions: Tensor, columns: int = _COLUMNS) -> Image.Image:
    """A picture of images (B, 3, H, W) in [-1, 1]: a row of originals above one of the others."""
    rows = []
    for start in range(0, len(originals), columns):
        for images in (originals, reconstructions):
            part = images[start : start + columns]
            missing = part.new_full((columns - len(part), *part.shape[1:]), -1.0)
            rows.append(torch.cat([*part, *missing], -1))
    pixels = torch.cat(rows, -2).clamp(-1, 1).permute(1, 2, 0).add(1).mul(127.5)
    return Image.fromarray(pixels.round().numpy().astype(np.uint8))


def _factor(spread: float, name: str) -> float:
    if not (math.isfinite(spread) and spread > 1e-6):
        raise RuntimeError(
            f"the latents' {name} is {spread}: the encoder gives the same vector everywhere. Train "
            "longer, or with another --learning_rate."
        )
    return 1.0 / spread
