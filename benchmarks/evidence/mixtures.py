"""Tasks of mixtures of normal laws, where the error of a denoiser is known exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.mixture import Mixture, sliced_distance
from benchmarks.evidence.network import SeededNetwork, StackedMlp, predicted
from benchmarks.evidence.sampling import generate, generators
from benchmarks.evidence.target import Target
from benchmarks.evidence.training import Values

PROBES, LOWEST, HIGHEST, LEVELS = 1024, -8.0, 8.0, 33


class MixtureTask:
    """Points of a mixture in ``dimensions`` dimensions.

    Attributes:
        quality: ``excess``, the integral over log-SNR from -8 to 8 of the excess of the squared
            error of v over that of the exact denoiser, (1 + S) |x0 - E[x0 | x]|^2 per coordinate.
    """

    quality = "excess"

    def __init__(
        self, config: Mapping[str, Any], settings: Mapping[str, Any], cache_dir: Path
    ) -> None:
        self.settings, self.size = settings, config["dimensions"]
        self.mixture = Mixture.drawn(
            config["dimensions"], config["components"], config["spread"], config["seed"]
        )

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, None]:
        """Fresh points."""
        return self.mixture.draw(count, generator), None

    def start(self, seeds: Sequence[int], target: Target, told: Mapping[str, Any]) -> StackedMlp:
        """A new network."""
        shape = {name: self.settings[name] for name in ("width", "blocks")}
        return StackedMlp(seeds, size=self.size, classes=0, **shape)

    def probe(self, count: int) -> tuple[Tensor, None]:
        """The points on which losses by noise level are measured."""
        return self.batch(count, torch.Generator().manual_seed(0))

    def measure(
        self, network: SeededNetwork, seeds: Sequence[int], target: Target, last: bool
    ) -> dict[str, Any]:
        """The excess, that of the noisier and the cleaner half of the log-SNRs, and the sliced
        Wasserstein distance of samples, for each seed; and the excess at each log-SNR."""
        levels, excess = self.excess(network, target)
        noisy = levels <= 0
        values: Values = {"excess": _integral(levels, excess).tolist()}
        for half, name in ((noisy, "excess, noisy half"), (~noisy, "excess, clean half")):
            values[name] = _integral(levels[half], excess[:, half]).tolist()
        steps, count = self.settings["sampling_steps"][0], self.settings["samples"]
        noise = [torch.randn(count, self.size, generator=g) for g in generators(seeds, "samples")]
        made = generate(network, target, torch.stack(noise), None, steps=steps, guidance=1.0)
        values["sliced"] = [sliced_distance(self.mixture, rows) for rows in made]
        return {"metrics": values, "excess": _by_level(levels, excess)}

    @torch.no_grad()
    def excess(self, network: Any, target: Target) -> tuple[Tensor, Tensor]:
        """Log-SNRs (L,), increasing, and the excess of the squared error of v at each, (S, L)."""
        at, found = target.grid(LOWEST, HIGHEST, LEVELS).flip(0), []
        clean, generator = self.probe(PROBES)[0], torch.Generator().manual_seed(1)
        noise = torch.randn(clean.shape, generator=generator)
        for index in at:
            found.append(self._excess_at(network, target, clean, noise, index.expand(PROBES)))
        return target.levels.log_snr[at], torch.stack(found, 1)

    def _excess_at(
        self, network: Any, target: Target, clean: Tensor, noise: Tensor, at: Tensor
    ) -> Tensor:
        objective, levels = target.objective, target.levels
        noisy, log_snr = objective.add_noise(clean, noise, at), levels.log_snr[at[0]]
        exact = self.mixture.denoised(noisy, levels.alpha[at], levels.sigma[at])
        given = objective.scale_input(noisy, at).expand(network.seeds, -1, -1)
        predictions = predicted(network, given, log_snr.expand(network.seeds, 1), None)
        errors = [
            (objective.denoised(each.double(), noisy.double(), at) - exact).square().mean()
            for each in predictions
        ]
        return (1 + log_snr.exp()) * torch.stack(errors)


def _by_level(levels: Tensor, excess: Tensor) -> dict[str, Any]:
    return {"log_snr": levels.tolist(), "of_seeds": excess.tolist()}


def _integral(x: Tensor, y: Tensor) -> Tensor:
    return torch.trapezoid(y, x, dim=-1)
