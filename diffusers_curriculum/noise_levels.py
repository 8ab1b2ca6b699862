"""One view of any diffusers scheduler: a table of noise levels in log-SNR, and levels between them.

Everything that chooses, groups, weighs or reports noise levels is written against
:class:`NoiseLevels`. No other module knows what schedulers call their noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_curriculum.checks import one_of

OUTER_EDGES = ("half", "clip", "inf")


class Clock(NamedTuple):
    """What a network is told of a noise level: ``scale`` times sigma, or its natural logarithm."""

    logarithmic: bool
    scale: float


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The noise levels a scheduler trains on, index 0 = cleanest.

    The coordinate is ``log_snr = log(alpha^2 / sigma^2)`` of ``x = alpha * x0 + sigma * noise``.

    Attributes:
        log_snr: (T,) float64, decreasing; -inf where alpha is 0.
        alpha: (T,) float64, coefficient of the data.
        sigma: (T,) float64, coefficient of the noise.
        timesteps: (T,) what the model is conditioned on, in the scheduler's own dtype.
        edges: (T+1,) float64, decreasing; level i owns the cell (edges[i+1], edges[i]].
        prediction_type: what the network predicts: "epsilon", "v_prediction", "sample", "flow" or
            "edm", the output F of EDM's preconditioned network (arXiv 2206.00364, eq. 7), which
            EDM schedulers of diffusers call "epsilon"; their "v_prediction" is -F.
        family: "vp" (alpha^2 + sigma^2 = 1), "flow" (alpha + sigma = 1) or "edm" (alpha = 1).
        sigma_data: standard deviation of the data, of schedulers with EDM's preconditioning.
        clock: how the timesteps follow from sigma; None where only those of the table are known.
        shift: s of flow matching with sigma = s t / (1 + (s - 1) t), t = 1 / T, 2 / T, ..., 1;
            None where that is 1, or where sigma is none of these.
    """

    log_snr: Tensor
    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor
    edges: Tensor
    prediction_type: str
    family: str
    sigma_data: float | None = None
    clock: Clock | None = None
    shift: float | None = None
    _copies: dict[str, NoiseLevels] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.log_snr)

    @classmethod
    def from_scheduler(cls, scheduler: Any, outer_edges: str = "half") -> NoiseLevels:
        """Read the training noise levels of any diffusers scheduler.

        Args:
            scheduler: a scheduler instance, for training or inference; a previous call of
                ``set_timesteps`` on it does not matter.
            outer_edges: where the first and the last cell end: "half" reflects their inner half,
                "clip" stops at the level itself, "inf" leaves them open.

        Raises:
            ValueError: unknown ``outer_edges``, or a scheduler without a table of noise levels
                (the message names the attributes that were missing).
        """
        one_of("outer_edges", outer_edges, OUTER_EDGES)
        family, alpha, sigma, timesteps = read_tables(scheduler)
        log_snr = _log_snr(family, alpha, sigma)
        if len(log_snr) < 2 or bool((log_snr.diff() > 0).any()) or bool(timesteps.isinf().any()):
            raise ValueError(
                f"{type(scheduler).__name__} has no decreasing table of at least two noise levels "
                f"(found {len(log_snr)} levels); pass a scheduler made for training."
            )
        config = getattr(scheduler, "config", {})
        prediction = config.get("prediction_type")
        default = "flow" if family == "flow" else "epsilon"
        sigma_data = config.get("sigma_data") if prediction and family == "edm" else None
        return cls(
            log_snr=log_snr,
            alpha=alpha,
            sigma=sigma,
            timesteps=timesteps,
            edges=cell_edges(log_snr, outer_edges),
            prediction_type=_canonical(prediction or default, sigma_data),
            family=family,
            sigma_data=sigma_data,
            clock=None if family == "vp" else clock_of(sigma, timesteps),
            shift=_shift_of(alpha, sigma) if family == "flow" else None,
        )

    def to(self, device: torch.device | str) -> NoiseLevels:
        """The same table on ``device``; copies are made once and kept (float32 where a device has
        no float64)."""
        key = str(torch.device(device))
        if key == str(self.log_snr.device):
            return self
        if key not in self._copies:
            self._copies[key] = replace(to_device(self, device), _copies={})
        return self._copies[key]

    def with_prediction_type(self, prediction_type: str) -> NoiseLevels:
        """The same levels for a network that predicts ``prediction_type``, in this library's words
        or in those of the scheduler's config."""
        canonical = _canonical(prediction_type, self.sigma_data)
        return replace(self, prediction_type=canonical, _copies={})

    @property
    def continuous(self) -> bool:
        """Whether noise levels between those of the table can be trained (flow matching, EDM)."""
        return self.clock is not None

    def coefficients(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at indices (int64) or at log-SNRs (floating), any shape.

        Raises:
            ValueError: log-SNRs on a variance preserving schedule, whose networks know timesteps.
        """
        if not at.is_floating_point():
            return self.alpha[at], self.sigma[at]
        if self.family == "vp":
            raise ValueError("family 'vp' has no levels between its timesteps: pass int64 indices.")
        if self.family == "flow":
            return torch.sigmoid(at / 2), torch.sigmoid(-at / 2)
        return torch.ones_like(at), torch.exp(-at / 2)

    def conditioning(self, log_snr: Tensor) -> Tensor:
        """What the network is told at ``log_snr`` (any shape), in the dtype of the timesteps.

        Raises:
            ValueError: the timesteps of this schedule do not follow from sigma.
        """
        if self.clock is None:
            raise ValueError(
                f"family {self.family!r} with these timesteps has no levels between them: draw "
                "timesteps (continuous=False), or use a flow-matching or EDM scheduler."
            )
        told = -log_snr / 2 if self.clock.logarithmic else self.coefficients(log_snr)[1]
        floating = self.timesteps.is_floating_point()
        return (self.clock.scale * told).to(self.timesteps.dtype if floating else torch.float32)

    @property
    def positions(self) -> Tensor:
        """(T,) log-SNR; a level at infinity stands one step beyond its neighbour."""
        positions = self.log_snr.clone()
        for end, one, two in ((0, 1, 2), (-1, -2, -3)):
            if bool(positions[end].isinf()):
                positions[end] = 2 * positions[one] - positions[two]
        return positions

    @property
    def finite(self) -> Tensor:
        """(T,) bool: where the log-SNR is finite (false at zero terminal SNR)."""
        return self.log_snr.isfinite()


def to_device(table: Any, device: torch.device | str) -> Any:
    """Copy a tensor, or a dict, tuple or dataclass with all its tensors, to ``device``, as float32
    where float64 does not exist (MPS).

    A copy from the host never waits for what the device still has to do: it is queued, on CUDA from
    pinned memory. A copy to the host waits, because it is read there.
    """
    device = torch.device(device)
    if isinstance(table, tuple):
        return tuple(to_device(each, device) for each in table)
    if isinstance(table, dict):
        return {name: to_device(each, device) for name, each in table.items()}
    if hasattr(table, "__dataclass_fields__"):
        tensors = {k: v for k, v in vars(table).items() if isinstance(v, Tensor)}
        return replace(table, **to_device(tensors, device))
    if device.type == "mps":  # its queued copies would read the host's memory too late
        return (table.float() if table.dtype == torch.float64 else table).to(device)
    if device.type == "cuda" and table.device.type == "cpu":
        table = table.pin_memory()
    return table.to(device, non_blocking=device.type != "cpu")


def cell_edges(log_snr: Tensor, outer_edges: str = "half") -> Tensor:
    """(T+1,) edges of the cells that share out the log-SNR axis among levels (T,), decreasing both.

    Inner edges are midpoints of neighbours.  A level at -inf (zero terminal SNR) or +inf gets a
    finite inner edge, half a neighbouring step away, and an infinite outer one: a plain midpoint
    would be infinite too, and the level would silently lose its mass. ``outer_edges``: see
    :meth:`NoiseLevels.from_scheduler`.
    """
    first, last = (0 if log_snr[0].isfinite() else 1), len(log_snr) - int(log_snr[-1].isinf())
    finite = log_snr[first:last]
    if len(finite) < 2 or not bool(finite.isfinite().all()):
        raise ValueError("a schedule needs two or more levels of finite log-SNR.")
    top = finite[0] + (finite[0] - finite[1]) / 2
    bottom = finite[-1] - (finite[-2] - finite[-1]) / 2
    inner = (finite[:-1] + finite[1:]) / 2
    infinity = torch.tensor([torch.inf], dtype=log_snr.dtype)
    upper = {"half": top, "clip": finite[0], "inf": infinity[0]}[outer_edges].reshape(1)
    lower = {"half": bottom, "clip": finite[-1], "inf": -infinity[0]}[outer_edges].reshape(1)
    upper = upper if first == 0 else torch.cat([infinity, top.reshape(1)])
    lower = lower if last == len(log_snr) else torch.cat([bottom.reshape(1), -infinity])
    return torch.cat([upper, inner, lower])


def _canonical(prediction_type: str, sigma_data: float | None) -> str:
    if prediction_type == "epsilon" and sigma_data is not None:
        return "edm"
    return "flow" if prediction_type == "flow_prediction" else prediction_type


def _log_snr(family: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    if family == "vp":  # alpha^2 is exact: log1p keeps the clean end's digits
        power = alpha.square()
        return power.log() - torch.log1p(-power)
    return 2 * (alpha.log() - sigma.log())


# -- what diffusers' schedulers call their noise levels --------------------------------------------


def read_tables(scheduler: Any) -> tuple[str, Tensor, Tensor, Tensor]:
    """(family, alpha, sigma, timesteps), cleanest first."""
    config = getattr(scheduler, "config", {})
    if config.get("use_flow_sigmas"):
        return _flow_inference_tables(config)
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        return _variance_preserving_tables(scheduler.alphas_cumprod)
    if isinstance(getattr(scheduler, "discrete_sigmas", None), Tensor):
        return _exploding_tables(scheduler.discrete_sigmas, scheduler.discrete_sigmas)
    # set_timesteps overwrites sigmas and timesteps: read them from an unused copy.
    make = getattr(type(scheduler), "from_config", None)
    unused = make(config) if make else None
    sigmas, timesteps = getattr(unused, "sigmas", None), getattr(unused, "timesteps", None)
    if isinstance(sigmas, Tensor) and isinstance(timesteps, Tensor) and len(timesteps) > 1:
        sigmas, timesteps = sigmas[: len(timesteps)].flip(0), timesteps.flip(0)
        if "shift" in config:
            return _flow_tables(sigmas, timesteps)
        if "sigma_data" in config or "sigma_max" in config:
            return _exploding_tables(sigmas, timesteps)
    raise ValueError(
        f"{type(scheduler).__name__} shows no table of training noise levels: it has neither "
        "`alphas_cumprod` nor `sigmas` with `timesteps` and one of the settings `shift` (flow "
        "matching), `sigma_data` or `sigma_max` (EDM). Pass the scheduler of the training."
    )


def _variance_preserving_tables(alphas_cumprod: Tensor) -> tuple[str, Tensor, Tensor, Tensor]:
    # float32, in which diffusers adds noise: narrowed again, the bits are those it works with
    power = alphas_cumprod.detach().cpu().float()
    if len(power) > 1 and power[-2] < power[-1] == 2.0**-24:  # what samplers write for zero
        power = torch.cat([power[:-1], power.new_zeros(1)])
    alpha, sigma = power.double().sqrt(), (1.0 - power).double().sqrt()
    return "vp", alpha, sigma, torch.arange(len(power))


def _flow_tables(sigmas: Tensor, timesteps: Tensor) -> tuple[str, Tensor, Tensor, Tensor]:
    sigmas = sigmas.detach().cpu().float().clamp_max(1.0)  # a shift may round up to 1 + 1e-7
    return "flow", (1.0 - sigmas).double(), sigmas.double(), timesteps.cpu()


def _flow_inference_tables(config: Any) -> tuple[str, Tensor, Tensor, Tensor]:
    """The flow-matching training grid of schedulers that do flow matching at inference only."""
    count, shift = config["num_train_timesteps"], config.get("flow_shift", config.get("shift", 1.0))
    uniform = torch.arange(1, count + 1, dtype=torch.float32) / count
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    return _flow_tables(sigmas, sigmas * count)


def _exploding_tables(sigmas: Tensor, timesteps: Tensor) -> tuple[str, Tensor, Tensor, Tensor]:
    sigmas = sigmas.detach().cpu().double()
    return "edm", torch.ones_like(sigmas), sigmas, timesteps.detach().cpu()


def clock_of(sigma: Tensor, timesteps: Tensor) -> Clock | None:
    """The clock that gives these timesteps, if there is one."""
    told = timesteps.double()
    for logarithmic in (False, True):
        coordinate = sigma.log() if logarithmic else sigma
        far = coordinate.abs().argmax()
        scale = float(f"{float(told[far] / coordinate[far]):.6g}")  # free of float32's rounding
        if torch.allclose(told, scale * coordinate, rtol=1e-5, atol=1e-6 * abs(scale)):
            return Clock(logarithmic, scale)
    return None


def _shift_of(alpha: Tensor, sigma: Tensor) -> float | None:
    """The shift of a flow-matching table, if it has one."""
    t = torch.arange(1, len(sigma), dtype=torch.float64) / len(sigma)
    shifts = (sigma / alpha)[:-1] * (1 - t) / t
    shift = float(f"{float(shifts[len(shifts) // 2]):.6g}")  # free of float32's rounding
    same = torch.allclose(shifts, torch.full_like(shifts, shift), rtol=0.01)
    return shift if same and shift != 1 else None
