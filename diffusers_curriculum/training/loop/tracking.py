"""Losses gathered on the device, and read out now and then.

A step only adds; the one host synchronisation, and the one reduction over processes, is in
``read``. Every process must call ``read`` and ``state_dict`` alike, as both may reduce.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.training.data.plan import BatchPlan

try:
    import resource
except ImportError:  # Windows
    resource = None

Reduce = Callable[[Tensor], Tensor]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class Pace:
    """How far a run is, how fast it goes, and the most memory that it took.

    Speed is that of all that lies between two reports, saves and pictures included.

    Args:
        plan: how many samples an update and an epoch have.
        device: where the models are.
    """

    def __init__(self, plan: BatchPlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.start(0)

    def start(self, step: int) -> None:
        """Measure from here on, ``step`` steps being finished."""
        self._step, self._time = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """Epochs so far, samples of all processes per second, GiB of this one; measures anew."""
        now = time.perf_counter()
        samples, seconds = (step - self._step) * self.plan.total, now - self._time
        self._step, self._time = step, now
        return {
            "epoch": step * self.plan.total / self.plan.epoch,
            "samples_per_second": samples / max(seconds, 1e-9),
            "memory_gib": _peak_memory(self.device) / 2**30,
        }


def _peak_memory(device: torch.device) -> float:
    """Most bytes that tensors took on the device, or this process on the host; NaN if unknown."""
    measure = getattr(getattr(torch, device.type, None), "max_memory_allocated", None)
    if measure is not None:
        return float(measure(device))
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class _Window:
    """Sums and counts, (2, ...), of what was added since the last reading, on the device."""

    def __init__(self, device: torch.device | str, *shape: int) -> None:
        # float64 adds without drift; one backend lacks it
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._window = torch.zeros(2, *shape, dtype=dtype, device=device)

    def _take(self, reduce: Reduce) -> Tensor:
        """The window over all processes; a new one begins."""
        window = reduce(self._window.clone())
        self._window.zero_()
        return window

    def state_dict(self, reduce: Reduce = _itself) -> dict[str, Tensor]:
        """Sums and counts of the open window over all processes."""
        return {"window": reduce(self._window.clone())}

    def load_state_dict(self, state: Mapping[str, Tensor], is_main_process: bool = True) -> None:
        """Continue from a saved state; the window goes to one process, so that it counts once."""
        self._window.copy_(state["window"] if is_main_process else torch.zeros_like(self._window))


class LossSummary(NamedTuple):
    """Mean loss per bin of log-SNR over a whole run."""

    edges: tuple[float, ...]  # (bins + 1,) ascending, in units of log-SNR
    means: tuple[float, ...]  # (bins,) mean unweighted loss, NaN where nothing was drawn
    counts: tuple[int, ...]  # (bins,) samples seen


class LossByNoiseLevel(_Window):
    """Sums and counts of the unweighted loss per sample, in bins of log-SNR of equal width.

    The bins cover the finite part of the table; levels at -inf or +inf count to the end bins.

    Args:
        levels_log_snr: (T,) log-SNR of every noise level, in any order.
        bins: how many.
        device: where losses and indices live.

    Raises:
        ValueError: fewer than one bin, or no finite log-SNR.
    """

    def __init__(
        self, levels_log_snr: Tensor, bins: int = 10, device: torch.device | str = "cpu"
    ) -> None:
        edges = _edges(levels_log_snr, bins)
        super().__init__(device, bins)
        self.edges: tuple[float, ...] = tuple(edges.tolist())
        self.names = _names(self.edges)
        inner = torch.bucketize(levels_log_snr.double().cpu(), edges[1:-1], right=True)
        self._bin_of_level = inner.to(device)
        self._totals = torch.zeros_like(self._window)

    def add(self, indices: Tensor, losses: Tensor) -> None:
        """Count the samples of a micro-batch, without a host synchronisation.

        Args:
            indices: (B,) noise level of each sample, on the device.
            losses: (B,) unweighted loss of each sample, on the device.
        """
        rows = _finite_rows(losses.detach().to(self._window.dtype))
        self._window.index_add_(1, self._bin_of_level[indices], rows)

    def read(self, reduce: Reduce = _itself) -> dict[str, float]:
        """Metrics of all samples since the last reading, which also starts a new window.

        Args:
            reduce: sums a tensor over all processes, such as ``accelerator.reduce``.

        Returns:
            ``loss_log_snr/[low,high)`` for every bin that was drawn from, ``count_log_snr/...``
            for every bin.
        """
        window = self._take(reduce)
        self._totals += window
        bins = [*zip(self.names, *window.tolist(), strict=True)]
        metrics = {f"loss_log_snr/{name}": total / n for name, total, n in bins if n}
        return metrics | {f"count_log_snr/{name}": n for name, _, n in bins}

    def absorb(self, other: LossByNoiseLevel) -> None:
        """Take over all that another one of the same bins has seen, which begins anew."""
        self._window.add_(other._window)
        self._totals.add_(other._totals)
        other._window.zero_()
        other._totals.zero_()

    def summary(self, reduce: Reduce = _itself) -> LossSummary:
        """The whole run up to now, the unread window included; resets nothing."""
        sums, counts = (self._totals + reduce(self._window.clone())).tolist()
        means = (s / n if n else math.nan for s, n in zip(sums, counts, strict=True))
        return LossSummary(self.edges, tuple(means), tuple(int(n) for n in counts))

    def state_dict(self, reduce: Reduce = _itself) -> dict[str, Tensor]:
        """Window and totals, (2, bins) each: row 0 sums, row 1 counts, over all processes."""
        return super().state_dict(reduce) | {"totals": self._totals.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor], is_main_process: bool = True) -> None:
        """As that of every window.

        Raises:
            ValueError: the state is of another number of bins.
        """
        saved = tuple(state["window"].shape)
        if saved != tuple(self._window.shape):
            raise ValueError(
                f"saved loss bins have shape {saved}, this run has {tuple(self._window.shape)}; "
                "resume with the number of bins of the first run"
            )
        super().load_state_dict(state, is_main_process)
        self._totals.copy_(state["totals"])


class RunningMean(_Window):
    """Mean of everything added since the last reading, kept on the device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)

    def add(self, values: Tensor) -> None:
        """Add a value or a tensor of values, without a host synchronisation."""
        self._window += _finite_rows(values.detach().to(self._window.dtype).flatten()).sum(1)

    def read(self, reduce: Reduce = _itself) -> float:
        """The mean over all processes, NaN if nothing was added; starts a new window."""
        total, count = self._take(reduce).tolist()
        return total / count if count else math.nan


def _finite_rows(values: Tensor) -> Tensor:
    """(2, N): the values and their counts; 0 and 0 for those that are not finite, as one of them
    would spoil every mean."""
    finite = values.isfinite()
    return torch.stack([torch.where(finite, values, 0.0), finite.to(values.dtype)])


def _edges(log_snr: Tensor, bins: int) -> Tensor:
    """(bins + 1,) ascending float64 edges that cover the finite levels."""
    finite = log_snr[torch.isfinite(log_snr)].double().cpu()
    if bins < 1 or len(finite) == 0:
        raise ValueError(
            f"{bins} bins over {len(finite)} finite noise levels; give at least one bin and a "
            "scheduler with a finite log-SNR"
        )
    return torch.linspace(float(finite.min()), float(finite.max()), bins + 1, dtype=torch.float64)


def _names(edges: tuple[float, ...]) -> tuple[str, ...]:
    """ "[low,high)" with as few decimals as tell the edges apart; the last bin is closed."""
    width = (edges[-1] - edges[0]) / (len(edges) - 1)
    decimals = max(1, 1 - math.floor(math.log10(width))) if width > 0 else 1
    texts = [f"{round(edge, decimals) + 0.0:g}" for edge in edges]
    names = [f"[{low},{high})" for low, high in pairwise(texts)]
    return (*names[:-1], names[-1][:-1] + "]")
