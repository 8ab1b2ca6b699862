"""The critic of adversarial training: a residual convolutional discriminator as in StyleGAN2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, softplus

_LARGEST_END = 8  # side of the grid that the last layers see at most


class _Halving(nn.Module):
    """Two convolutions beside a direct path, both down to half the side; variance is kept."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(inner, inner), _convolution(inner, outer)
        self.skip = nn.Conv2d(inner, outer, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (avg_pool2d(self.second(self.first(x)), 2) + self.skip(avg_pool2d(x, 2))) / 2**0.5


class Discriminator(nn.Module):
    """Real or not, from images: residual halvings to a small grid (arXiv 1912.04958).

    The standard deviation over the batch is one more channel before the end, so that too much
    sameness is seen. A ValueError refuses another resolution, or no channels.

    Args:
        resolution: side of the images, 4 to 8 times a power of 2.
        width: channels at full resolution; doubled at each halving, up to ``max_width``.
    """

    def __init__(
        self, resolution: int, in_channels: int = 3, width: int = 64, max_width: int = 512
    ) -> None:
        super().__init__()
        side, channels = resolution, min(width, max_width)
        if width < 1 or max_width < 1 or in_channels < 1:
            raise ValueError(f"width={width}, max_width={max_width}: take at least one channel.")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 1), nn.LeakyReLU(0.2)]
        while side > 4 and side % 2 == 0:
            outer = min(2 * channels, max_width)
            layers.append(_Halving(channels, outer))
            side, channels = side // 2, outer
        if not 1 <= side <= _LARGEST_END:
            raise ValueError(
                f"the discriminator cannot halve a resolution of {resolution} down to at most "
                f"{_LARGEST_END} pixels: take a power of 2 times 4 to 8."
            )
        self.body = nn.Sequential(*layers)
        self.mix = _convolution(channels + 1, channels)
        self.head = nn.Sequential(
            nn.Linear(channels * side**2, channels), nn.LeakyReLU(0.2), nn.Linear(channels, 1)
        )
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,) of images (B, C, R, R): above 0 means real."""
        x = self.body(images)
        spread = (x.var(0, correction=0) + 1e-8).sqrt().mean()
        x = torch.cat([x, spread.expand(len(x), 1, *x.shape[2:])], 1)
        return self.head(self.mix(x).flatten(1))[:, 0]


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating: mean softplus(-D(fake)), the negative log of the chance to pass as real
    (arXiv 1406.2661)."""
    return softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic: mean softplus(-D(real)) + mean softplus(D(fake)) (arXiv 1406.2661)."""
    return softplus(-real).mean() + softplus(fake).mean()


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """R1 = mean over images of |grad_x D(x)|^2, at real images (arXiv 1801.04406, eq. 9).

    Added to the loss as gamma / 2 times this; where it is computed only every k batches, times k.
    """
    images = images.detach().requires_grad_()
    logits = discriminator(images).sum()
    (gradient,) = torch.autograd.grad(logits, images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def _convolution(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.LeakyReLU(0.2))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, a=0.2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
