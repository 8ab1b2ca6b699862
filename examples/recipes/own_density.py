"""A density of your own, in five lines: a triangle over log-SNR, centred at mu, of half-width w."""

from dataclasses import dataclass

from diffusers import DDPMScheduler
from torch import Tensor

from diffusers_curriculum import DensityTimestepSampler
from diffusers_curriculum.densities import SymmetricDensity, positive, register


@register("triangle")
@dataclass(frozen=True)
class Triangle(SymmetricDensity):
    mu: float = 0.0
    w: float = positive(4.0)

    def _pdf(self, z: Tensor) -> Tensor:
        return (1 - z.abs() / self.w).clamp_min(0) / self.w

    def _lower_cdf(self, z: Tensor) -> Tensor:
        return (1 + z / self.w).clamp_min(0).square() / 2

    def _lower_icdf(self, p: Tensor) -> Tensor:
        return self.w * ((2 * p).sqrt() - 1)


if __name__ == "__main__":
    sampler = DensityTimestepSampler(DDPMScheduler(), "triangle", {"mu": 1.0}, floor=0.0)
    drawn = sampler.levels.log_snr[sampler.sample(100_000).indices]
    print(f"log-SNR {float(drawn.min()):.2f} to {float(drawn.max()):.2f}, mean {drawn.mean():.2f}")
