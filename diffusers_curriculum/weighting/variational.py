"""The variational term that trains the variances of networks with 2C output channels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusers_curriculum.checks import above_zero, check_fields, checked, whole
from diffusers_curriculum.noise_levels import NoiseLevels, to_device
from diffusers_curriculum.objective import Objective

_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, eq=False)
class VariationalBound:
    """lambda L_vlb of improved DDPM (arXiv 2102.09672, eq. 16), estimated from one level a sample.

    L_vlb is the sum over the T levels of L_i = KL(q(x_{i-1} | x_i, x0) || p(x_{i-1} | x_i)) (eq. 4
    to 7), a mean over the elements in bits per dimension; T L_i at a uniformly drawn level i
    estimates it, so :meth:`loss` is weight * T * L_i, to be added to the simple loss with the
    weight 0.001 of the paper. The network gives v, and log variance = v' log beta + (1 - v')
    log beta~ with v' = (v + 1) / 2 (eq. 15; ``variance_type="learned_range"`` of diffusers). Only
    the variance is trained: the mean is detached (section 3.1).

    At level 0 beta~ is 0: that of level 1 stands in its log. The likelihood of x0 there needs data
    of known bins, so it depends on what is diffused.

    Args:
        levels: a variance preserving schedule with prediction type epsilon, v_prediction or sample.
        weight: lambda.
        bins: for pixels in [-1, 1], the number of values of a pixel, whose discretised Gaussian
            likelihood is L_0 (arXiv 2006.11239, eq. 13); None for latents, which have no bins: L_0
            is the KL to a Gaussian of the stand-in variance around x0.

    Raises:
        ValueError: another family or prediction type, epsilon at zero terminal SNR, or a number out
            of range.
    """

    levels: NoiseLevels
    weight: float = checked(above_zero, default=0.001)
    bins: int | None = checked(whole, 2, default=None)
    _tables: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        kind, family = self.levels.prediction_type, self.levels.family
        if family != "vp" or kind not in _TYPES:
            raise ValueError(
                f"a learned variance is defined for {', '.join(_TYPES)} on variance preserving "
                f"schedules, not for {kind!r} on {family!r}: train the mean alone."
            )
        if kind == "epsilon" and not bool(self.levels.alpha.all()):
            raise ValueError(
                "prediction_type='epsilon' has no mean at the schedule's zero terminal SNR: use "
                "v_prediction, or a schedule without it."
            )
        check_fields(self)
        self._tables[torch.device("cpu")] = _posterior(self.levels.to("cpu"))

    def split(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The mean part and the variance part of a network's output (B, 2C, ...), (B, C, ...) each;
        ValueError for an odd number of channels."""
        if prediction.ndim < 2 or prediction.shape[1] % 2:
            raise ValueError(
                f"an output of shape {tuple(prediction.shape)} has no two halves of channels: give "
                "the network twice as many output channels as input channels."
            )
        mean, variance = prediction.chunk(2, dim=1)
        return mean, variance

    def loss(
        self,
        mean_prediction: Tensor,
        variance_part: Tensor,
        sample: Tensor,
        noisy: Tensor,
        indices: Tensor,
    ) -> Tensor:
        """(B,) float32 weight * T * L_i of each sample, with a gradient by ``variance_part`` alone.

        Args:
            mean_prediction: (B, C, ...) what the network predicts of epsilon, v or x0.
            variance_part: (B, C, ...) v.
            sample: (B, C, ...) x0.
            noisy: (B, C, ...) x at the levels ``indices``, (B,) int64.
        """
        terms = self.bits_per_dimension(mean_prediction, variance_part, sample, noisy, indices)
        return self.weight * len(self.levels) * terms

    def bits_per_dimension(
        self,
        mean_prediction: Tensor,
        variance_part: Tensor,
        sample: Tensor,
        noisy: Tensor,
        indices: Tensor,
    ) -> Tensor:
        """L_i (B,) in bits per dimension; arguments as of :meth:`loss`."""
        dtype = torch.promote_types(sample.dtype, torch.float32)
        sample, noisy = sample.to(dtype), noisy.to(dtype)
        objective = Objective(self.levels)
        guess = objective.denoised(mean_prediction.detach().to(dtype), noisy, indices)
        log_variance = self.log_variance(variance_part.to(dtype), indices)
        true_log, scale = self._at(sample, indices, "log_lower", "scale")
        # both means hold the same multiple of x: their difference is one of x0
        terms = _gaussian_kl(scale * (sample - guess), true_log, log_variance)
        if self.bins is not None:
            first = self._shaped(sample, indices) == 0
            mean = torch.where(first, guess, sample)  # elsewhere its gradient may be no number
            decoded = -_log_likelihood(sample, mean, log_variance, self.bins)
            terms = torch.where(first, decoded, terms)
        return terms.flatten(1).mean(1) / math.log(2)

    def log_variance(self, variance_part: Tensor, indices: Tensor) -> Tensor:
        """log of the variance of p(x_{i-1} | x_i) that v says; the shape of ``variance_part``."""
        lower, upper = self._at(variance_part, indices, "log_lower", "log_upper")
        share = (variance_part + 1) / 2
        return share * upper + (1 - share) * lower

    def _at(self, like: Tensor, indices: Tensor, *names: str) -> list[Tensor]:
        if like.device not in self._tables:
            self._tables[like.device] = to_device(self._tables[torch.device("cpu")], like.device)
        tables = self._tables[like.device]
        return [self._shaped(like, tables[name][indices]).to(like.dtype) for name in names]

    @staticmethod
    def _shaped(like: Tensor, per_sample: Tensor) -> Tensor:
        return per_sample.view((-1,) + (1,) * (like.ndim - 1))


def _posterior(levels: NoiseLevels) -> dict[str, Tensor]:
    """log beta, log beta~ and the factor of x0 in the mean of q(x_{i-1} | x_i, x0), (T,) float64
    each (arXiv 2006.11239, eq. 7)."""
    power, noise = levels.alpha.square(), levels.sigma.square()
    before = torch.cat([torch.ones_like(power[:1]), power[:-1]])
    noise_before = torch.cat([torch.zeros_like(noise[:1]), noise[:-1]])
    beta = 1 - power / before
    variance = noise_before / noise * beta
    variance[0] = variance[1]
    return {
        "log_lower": variance.log(),
        "log_upper": beta.log(),
        "scale": before.sqrt() * beta / noise,
    }


def _gaussian_kl(difference: Tensor, true_log: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(m, e^true_log) || N(m + difference, e^log_variance)) in nats, elementwise."""
    ratio = torch.exp(true_log - log_variance)
    return 0.5 * (
        log_variance - true_log + ratio - 1 + difference.square() * torch.exp(-log_variance)
    )


def _log_likelihood(sample: Tensor, mean: Tensor, log_variance: Tensor, bins: int) -> Tensor:
    """log of the mass that N(mean, e^log_variance) gives the bin of each pixel, the outer bins
    open, in nats."""
    half, precision = 1 / (bins - 1), torch.exp(-log_variance / 2)
    difference = sample - mean
    # the bin is reflected to the lower tail, where logarithms of the cdf keep their digits
    distance = -difference.abs()
    upper = torch.special.log_ndtr((distance + half) * precision)
    lower = torch.special.log_ndtr((distance - half) * precision)
    inside = upper + torch.log(-torch.expm1(lower - upper))
    bottom = torch.special.log_ndtr((difference + half) * precision)
    top = torch.special.log_ndtr((half - difference) * precision)
    open_top = torch.where(sample > 1 - half, top, inside)
    return torch.where(sample < half - 1, bottom, open_top)
