"""One view of any latent space: pixels, AutoencoderKL, VQModel and ViTVQModel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.models.loading import load_model, read_config

# Known autoencoders, and where they are imported from when one is used: that takes seconds.
KINDS = {
    "AutoencoderKL": "diffusers",
    "VQModel": "diffusers",
    "ViTVQModel": "diffusers_curriculum.models.vit_vq",
}


class Moments(NamedTuple):
    """The scaled latents of a batch, float32: the mean, and the standard deviation where the
    encoder gives one (None: the mean is the latent)."""

    mean: Tensor
    std: Tensor | None


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """The space a diffusion model works in, and the way there and back.

    Latents are scaled, ready to be diffused: `(z - shift_factor) * scaling_factor` of an
    AutoencoderKL (`(z - latents_mean) / latents_std * scaling_factor` where its config has those),
    `z * scaling_factor` of a VQModel and of a ViTVQModel, the image itself in pixels. The latents
    of the last two are the encoder's continuous ones; only decoding snaps them to the codebook.

    Attributes:
        model: the autoencoder, None in pixels.
        kind: "pixels", "AutoencoderKL", "VQModel" or "ViTVQModel".
        batch_size: how many images go through the autoencoder at once.
        colours: channels of images, in pixels: 1 (grey), 3 or 4 (with alpha).
    """

    model: Any
    kind: str
    batch_size: int = 16
    colours: int = 3

    @classmethod
    def of(cls, vae: Any, batch_size: int = 16, colours: int = 3) -> LatentSpace:
        """Return the latent space of `vae`, None for pixels; a ValueError refuses an autoencoder of
        another class, or with two shifts, and a batch without room."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} encodes nothing: give 1 or more.")
        if vae is None:
            return cls(None, "pixels", batch_size, colours)
        names = [kind.__name__ for kind in type(vae).__mro__]
        for kind in KINDS:
            if kind in names:
                _check_shifts(vae, kind)
                return cls(vae, kind, batch_size)
        raise ValueError(
            f"{type(vae).__name__} is no known autoencoder: give one of {', '.join(KINDS)}, or "
            "None for pixels."
        )

    @classmethod
    def load(
        cls,
        path: str,
        revision: str | None = None,
        variant: str | None = None,
        subfolder: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> LatentSpace:
        """Load the autoencoder in a folder or Hub repository, frozen, from safetensors only; a
        ValueError says that it cannot be read, or that its config.json names no known one."""
        kind, _ = _read_kind(path, revision, subfolder)
        vae = load_model(kind, path, revision, variant, subfolder, dtype)
        return cls.of(vae.requires_grad_(False).eval(), batch_size)

    @classmethod
    def empty(cls, path: str, revision: str | None, subfolder: str | None) -> LatentSpace:
        """Like :meth:`load`, but without the weights, for the shapes alone."""
        kind, config = _read_kind(path, revision, subfolder)
        with torch.device("meta"):
            return cls.of(kind.from_config(config))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Moments:
        """Return the scaled latents of images (B, C, H, W) in [-1, 1] on the model's device."""
        if self.model is None:
            return Moments(pixels.float(), None)
        parts = [self._encode(part) for part in self._batches(pixels)]
        stds = [part.std for part in parts if part.std is not None]
        return Moments(torch.cat([part.mean for part in parts]), torch.cat(stds) if stds else None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, C, H, W), float32 and about in [-1, 1], of scaled latents.

        A VQModel and a ViTVQModel snap to the nearest code, the latter after bringing every vector
        back to length 1, as sampling leaves the sphere.
        """
        if self.model is None:
            return latents.float()
        scale, offset = self._affine(latents)
        unscaled = latents.float() / scale + offset
        decode: Callable[..., Any] = self.model.decode
        parts = [decode(part, return_dict=False)[0] for part in self._batches(unscaled)]
        return torch.cat([part.float() for part in parts])

    def shape(self, resolution: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of square images; a ValueError says that
        the autoencoder does not divide that resolution, or takes another only."""
        only = self.model.config.image_size if self.kind == "ViTVQModel" else resolution
        if resolution != only:
            raise ValueError(
                f"resolution={resolution} does not fit the ViTVQModel, which takes images of "
                f"{only} x {only} pixels only: give {only}."
            )
        if resolution < 1 or resolution % self.downsampling:
            raise ValueError(
                f"resolution={resolution} does not fit the {self.kind}, which makes one latent of "
                f"{self.downsampling} x {self.downsampling} pixels: give a positive multiple of "
                f"{self.downsampling}."
            )
        side = resolution // self.downsampling
        return self.channels, side, side

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        if self.model is None:
            return self.colours
        config, other = self.model.config, {"ViTVQModel": "codebook_dim", "VQModel": "vq_embed_dim"}
        return int(config.get(other.get(self.kind)) or config["latent_channels"])

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent."""
        if self.model is None:
            return 1
        if self.kind == "ViTVQModel":
            return int(self.model.config.patch_size)
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    def _batches(self, images: Tensor) -> list[Tensor]:
        return list(images.to(self.model.dtype).split(self.batch_size))

    def _encode(self, pixels: Tensor) -> Moments:
        encoded = self.model.encode(pixels, return_dict=False)[0]
        posterior = self.kind == "AutoencoderKL"
        mean = (encoded.mean if posterior else encoded).float()
        scale, offset = self._affine(mean)
        return Moments((mean - offset) * scale, encoded.std.float() * scale if posterior else None)

    def _affine(self, like: Tensor) -> tuple[Any, Any]:
        """Scale and offset: scaled = (z - offset) * scale."""
        config = self.model.config
        scale = float(config.scaling_factor)
        if config.get("latents_mean") is None:
            return scale, config.get("shift_factor") or 0.0
        mean, std = (
            torch.tensor(config[name], device=like.device).view(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return scale / std, mean


def _class(kind: str) -> Any:
    return getattr(import_module(KINDS[kind]), kind)


def _read_kind(
    path: str, revision: str | None, subfolder: str | None
) -> tuple[Any, dict[str, Any]]:
    """The class and the config of a saved autoencoder."""
    config = read_config(path, revision, subfolder)
    kind = str(config.get("_class_name"))
    if kind not in KINDS:
        raise ValueError(
            f"{path!r} holds a {kind}, which is no known autoencoder: give the folder of one of "
            f"{', '.join(KINDS)} (of a pipeline: its subfolder 'vae')."
        )
    return _class(kind), config


def _check_shifts(vae: Any, kind: str) -> None:
    """Raise ValueError where the config says two things about where the latents' centre is."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None) or (mean is not None and config.get("shift_factor")):
        raise ValueError(
            f"the {kind}'s config has latents_mean={mean}, latents_std={std}, shift_factor="
            f"{config.get('shift_factor')}: set both of the first two, or only shift_factor."
        )
