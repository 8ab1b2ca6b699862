"""What a run will train on, as numbers: computed before anything is trained, then drawn or told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.analysis.advice import advice, normalised
from diffusers_curriculum.analysis.over_training import OverTraining, over_training
from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.samplers import TimestepSampler

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST = 7  # samplers in one comparison: as many as there are colours that can be told apart
DEFAULT_STEPS = 1000  # length of a run that is not told


class Quantiles(NamedTuple):
    """The timestep and the log-SNR below which 5, 25, 50, 75 and 95 % of a mass lie."""

    timestep: tuple[float, ...]
    log_snr: tuple[float, ...]


class Share(NamedTuple):
    """What a group of neighbouring noise levels gets of each law.

    Attributes:
        first, last: indices of its cleanest and its noisiest level.
        log_snr_low, log_snr_high: of its noisiest and its cleanest level.
        uniform: its share of uniform timesteps.
        drawn: its share of the draws, everything open.
        effective: its share of mass x weight x importance, everything open.
        over_run: its share of all draws of the run.
        opens: the step from which it is drawn at all, None if never.
    """

    first: int
    last: int
    log_snr_low: float
    log_snr_high: float
    uniform: float
    drawn: float
    effective: float
    over_run: float
    opens: float | None


@dataclass(frozen=True, eq=False)
class Preview:
    """What a sampler and a loss weight train on; arrays are float64, index 0 = cleanest.

    Attributes:
        title: the sampler in words.
        levels: its table of noise levels.
        mass: (T,) probability of each level once everything is open, at the end of the run.
        uniform: (T,) 1 / T, the baseline.
        weights: (T,) loss weight of each level, None if unweighted.
        effective: (T,) mass x weight x importance, normalised: the objective that is minimised.
        grouped_by: "cluster" (of a curriculum) or "tenth" (equal shares of uniform timesteps).
        shares: of each group, cleanest first.
        training: the laws of the run, one after the other.
        quantiles: of "drawn", "effective" and "uniform".
        warnings: what the user should think over, one sentence each.
        data_std: standard deviation of the data, None where it is not known.
    """

    title: str
    levels: NoiseLevels
    mass: np.ndarray
    uniform: np.ndarray
    weights: np.ndarray | None
    effective: np.ndarray
    grouped_by: str
    shares: tuple[Share, ...]
    training: OverTraining
    quantiles: Mapping[str, Quantiles]
    warnings: tuple[str, ...]
    data_std: float | None = None

    @property
    def normalised(self) -> str:
        """Where the drawn law lies in normalised log-SNR, in words."""
        return normalised(self.quantiles["drawn"].log_snr[1:4], self.data_std)

    @property
    def schedule(self) -> str:
        """The schedule in words."""
        kind = {"vp": "variance preserving", "flow": "flow matching", "edm": "EDM"}
        levels = self.levels
        finite = levels.log_snr[levels.finite]
        return (
            f"{kind.get(levels.family, levels.family)}, {len(levels)} noise levels, log-SNR "
            f"{float(finite[-1]):.2f} to {float(finite[0]):.2f}"
        )

    @property
    def laws(self) -> dict[str, np.ndarray]:
        """The masses to compare, by the name that a legend gives them."""
        drawn = {"uniform timesteps": self.uniform, "drawn": self.mass}
        if np.allclose(self.effective, self.mass, rtol=1e-6, atol=0):
            return drawn
        return drawn | {"drawn x weight": self.effective}

    @property
    def by_log_snr(self) -> tuple[np.ndarray, np.ndarray]:
        """Bin edges (81,) in log-SNR, and the densities (n, 80) of the n laws of the run."""
        return log_snr_histogram(self.levels, self.training.masses)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values for ``json.dumps``; an infinite log-SNR is None."""
        edges, heat = self.by_log_snr
        training = self.training
        return {
            "title": self.title,
            "schedule": self.schedule,
            "timesteps": self.levels.timesteps.tolist(),
            "log_snr": _finite(self.levels.log_snr.numpy()),
            "edges": _finite(self.levels.edges.numpy()),
            "mass": self.mass.tolist(),
            "uniform": self.uniform.tolist(),
            "weights": None if self.weights is None else self.weights.tolist(),
            "effective": self.effective.tolist(),
            "grouped_by": self.grouped_by,
            "shares": [dict(zip(Share._fields, _finite(s), strict=True)) for s in self.shares],
            "quantiles": {"probability": list(QUANTILES)}
            | {
                name: {"timestep": list(q.timestep), "log_snr": _finite(q.log_snr)}
                for name, q in self.quantiles.items()
            },
            "training": {
                "steps": [*training.starts.tolist(), float(training.steps)],
                "known": training.how,
                "edges": edges.tolist(),
                "density": heat.tolist(),
                "course": [
                    {
                        "step": step,
                        "mass": mass.tolist(),
                        "log_snr": _finite(quantiles(self.levels, mass).log_snr),
                    }
                    for step, mass in training.course.items()
                ],
            },
            "data_std": self.data_std,
            "normalised_log_snr": self.normalised,
            "warnings": list(self.warnings),
        }


def make_preview(
    sampler: TimestepSampler,
    weights: Tensor | None = None,
    max_train_steps: int | None = None,
    *,
    inference: Any = None,
    inference_steps: int = 50,
    title: str | None = None,
    refusal: str | None = None,
    data_std: float | None = None,
) -> Preview:
    """What ``sampler`` trains on under loss ``weights``; nothing of its state changes.

    Args:
        weights: (T,) loss weights, or None for an unweighted loss.
        max_train_steps: length of the run; None shows the first ``DEFAULT_STEPS`` steps.
        inference: the scheduler that will sample, to warn of levels that it visits and that are
            hardly ever trained; None: not looked at.
        title: default: the sampler in words.
        refusal: why training would not start, which a preview tells before its own warnings.
        data_std: standard deviation of the data, for normalised log-SNR; None: not known.

    Raises:
        ValueError: weights of another number of levels.
    """
    count = len(sampler.levels)
    if weights is not None and weights.shape != (count,):
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} do not fit {count} noise levels: pass one "
            "for each, as weighting.loss_weights() makes them."
        )
    training = over_training(sampler, max_train_steps or DEFAULT_STEPS)
    mass, importance = sampler.at_stage(step=training.steps - 1)
    corrected = mass * importance
    effective = corrected if weights is None else corrected * weights.cpu().double()
    laws = {"drawn": mass, "effective": effective, "uniform": torch.full_like(mass, 1 / count)}
    tables = {name: (law / law.sum()).numpy() for name, law in laws.items()}
    tables["drawn"] = mass.numpy()
    grouped_by, starts = sampler.groups()
    columns = tables["uniform"], tables["drawn"], tables["effective"], training.average
    over_run = mass.numpy() if max_train_steps is None else training.average
    refused = () if refusal is None else (f"training would be refused: {refusal}",)
    advised = advice(sampler.levels, corrected, weights, over_run, inference, inference_steps)
    return Preview(
        title=title or sampler.describe(),
        levels=sampler.levels,
        mass=tables["drawn"],
        uniform=tables["uniform"],
        weights=None if weights is None else weights.cpu().double().numpy(),
        effective=tables["effective"],
        grouped_by=grouped_by,
        shares=_shares(sampler.levels, starts, columns, training),
        training=training,
        quantiles={name: quantiles(sampler.levels, law) for name, law in tables.items()},
        warnings=(*refused, *advised),
        data_std=data_std,
    )


def check_comparable(previews: Mapping[str, Preview]) -> None:
    """Raise ValueError for what one picture or table cannot hold: fewer than two or more than
    ``MOST`` samplers, or different schedules."""
    if not 2 <= len(previews) <= MOST:
        raise ValueError(
            f"{len(previews)} different samplers are given: compare from 2 to {MOST} of them."
        )
    schedules = sorted({preview.schedule for preview in previews.values()})
    if len(schedules) > 1:
        told = "; ".join(schedules)
        raise ValueError(f"the samplers are of different schedules ({told}): compare those of one.")


def quantiles(levels: NoiseLevels, mass: np.ndarray) -> Quantiles:
    """The least timestep, and the least log-SNR, up to which a mass (T,) has come to each of
    ``QUANTILES``: values of the table, as those are what is drawn."""
    wanted = np.array(QUANTILES) - 1e-12  # a sum of tenths may end just below a half
    noisier = np.searchsorted(mass.cumsum(), wanted).clip(0, len(mass) - 1)
    cleaner = np.searchsorted(mass[::-1].cumsum(), wanted).clip(0, len(mass) - 1)
    log_snr = levels.log_snr.flip(0).numpy()[cleaner]
    return Quantiles(tuple(levels.timesteps.numpy()[noisier].tolist()), tuple(log_snr.tolist()))


def log_snr_histogram(
    levels: NoiseLevels, masses: np.ndarray, bins: int = 80
) -> tuple[np.ndarray, np.ndarray]:
    """Edges (bins + 1,) in log-SNR and densities (n, bins) of masses (n, T).

    Each level's mass is spread over its cell, as the levels of the clean end lie further apart than
    the bins; a level at infinity counts to the end bin.
    """
    cells = levels.edges.flip(0).numpy()
    finite = cells[np.isfinite(cells)]
    edges = np.linspace(finite[0], finite[-1], bins + 1)
    below = np.pad(masses[:, ::-1].cumsum(1), ((0, 0), (1, 0)))
    below = np.stack([np.interp(edges, cells.clip(edges[0], edges[-1]), row) for row in below])
    below[:, 0], below[:, -1] = 0, masses.sum(1)
    return edges, np.diff(below) / (edges[1] - edges[0])


def _shares(
    levels: NoiseLevels, starts: Sequence[int], laws: Sequence[np.ndarray], training: OverTraining
) -> tuple[Share, ...]:
    """The groups that begin at ``starts``, with what each gets of each of ``laws`` (T,)."""
    log_snr, last = levels.log_snr.tolist(), [*(s - 1 for s in starts[1:]), len(levels) - 1]
    drawn = np.add.reduceat(training.masses, starts, axis=1).T > 0  # (groups, n)
    opens = [float(training.starts[row.argmax()]) if row.any() else None for row in drawn]
    columns = [np.add.reduceat(law, starts) for law in laws]
    return tuple(
        Share._make((first, end, log_snr[end], log_snr[first], *map(float, shares), at))
        for first, end, *shares, at in zip(starts, last, *columns, opens, strict=True)
    )


def _finite(values: Any) -> list[Any]:
    return [None if v is None or not np.isfinite(v) else np.asarray(v).item() for v in values]
