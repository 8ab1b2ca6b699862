"""``compute_density_for_timestep_sampling``: where in a schedule to train, as diffusers' scripts
ask for it."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, training_utils
from torch import Tensor

from diffusers_curriculum.checks import inside
from diffusers_curriculum.densities import make_density, on_clock
from diffusers_curriculum.drop_in.names import (
    Scheme,
    compute_loss_weighting_for_sd3,
    logit_normal,
    mode,
    refuse_parameters,
    scheme,
)
from diffusers_curriculum.noise_levels import NoiseLevels, to_device
from diffusers_curriculum.randomness import Slots, batch_uniforms
from diffusers_curriculum.samplers.composition import compose, tables

FLOOR = 0.1
# Scripts compute floor(u T) in float32: u keeps this distance from the edges of its step, in steps,
# so that rounding never moves it to a neighbour.
_MARGIN = 1e-3
_BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


class ForScheduler:
    """diffusers' functions, bound to a schedule.

    Calls are counted: without ``step=`` the n-th call draws for step n, the same in every run with
    the same seed.

    Args:
        scheduler: a diffusers scheduler, default flow matching on 1000 levels without a shift.
        reversed_sigmas: flow matching whose sigma multiplies the data, x = sigma x0 + (1 - sigma)
            noise, as in Lumina2's script: u near 0 is clean there.

    Raises:
        ValueError: ``reversed_sigmas`` for a schedule that is not flow matching, or a scheduler
            without a table of noise levels.
    """

    def __init__(self, scheduler: Any = None, *, reversed_sigmas: bool = False) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
        levels = NoiseLevels.from_scheduler(scheduler)
        self.reversed_sigmas = reversed_sigmas
        self.levels = _reversed(levels) if reversed_sigmas else levels
        self._cdfs: dict[str, Tensor] = {}
        self._calls = 0

    def compute_density_for_timestep_sampling(
        self,
        weighting_scheme: str,
        batch_size: int | Slots,
        logit_mean: float | None = None,
        logit_std: float | None = None,
        mode_scale: float | None = None,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        *,
        draw: str = "iid",
        floor: float | None = None,
        seed: int | None = None,
        step: int | None = None,
        **density_args: Any,
    ) -> Tensor:
        """Draw u in [0, 1), such that ``floor(u * T)`` is an index into descending timesteps.

        "logit_normal" and "mode" are diffusers' laws of u; "none", and what names a loss weighting,
        is uniform. A density of this library is one of log-SNR: step ``floor(u * T)`` has exactly
        the probability that ``DensityTimestepSampler`` gives it on this schedule.

        Args:
            weighting_scheme: a name; "density:" before it skips diffusers' meaning.
            batch_size: number of draws on this rank, or the slots they fill of a global batch.
            logit_mean, logit_std, mode_scale: of diffusers' two laws, unused by the others, as in
                diffusers.
            generator: take the randomness from it instead of from (seed, step).
            draw: "iid", "stratified", "antithetic", "systematic" or "sobol".
            floor: share of the uniform law mixed into a density of this library, default 0.1.
            seed: default the seed that torch was given last.
            step: default the number of calls so far.
            density_args: of a density of this library.

        Returns:
            (batch_size,) float32 on ``device``.

        Raises:
            ValueError: unknown names or parameters, numbers out of range, or a density without
                mass on the schedule.
        """
        found = scheme(weighting_scheme)
        if found.kind != "density":
            given = {} if floor is None else {"floor": floor}
            refuse_parameters(found, density_args | given)
        key = torch.initial_seed() if seed is None else seed
        at = self._calls if step is None else step
        self._calls += step is None
        w = batch_uniforms(draw, batch_size, seed=key, step=at, generator=generator)
        if found.kind == "density":
            u = self._through(self._cdf(found, floor, density_args), w)
        elif found.name == "logit_normal":
            u = logit_normal(w, logit_mean, logit_std)
        else:
            u = mode(w, mode_scale) if found.name == "mode" else w
        return to_device(u.float().clamp(0, _BELOW_ONE), device)

    def compute_loss_weighting_for_sd3(
        self, weighting_scheme: str, sigmas: Tensor, **options: Any
    ) -> Tensor:
        """:func:`compute_loss_weighting_for_sd3` for the sigmas of this schedule."""
        if self.reversed_sigmas and scheme(weighting_scheme).kind == "weighting":
            sigmas = 1 - sigmas
        return compute_loss_weighting_for_sd3(weighting_scheme, sigmas, **options)

    def _cdf(self, found: Scheme, floor: float | None, density_args: dict[str, Any]) -> Tensor:
        """(T,) cumulative probabilities, cleanest first."""
        share = (0.0 if found.name == "uniform" else FLOOR) if floor is None else floor
        inside("floor", share, 0, 1)
        key = _json([found.name, share, density_args])
        if key not in self._cdfs:
            edges = self.levels.edges
            parameters = on_clock(found.name, density_args, self.levels.shift)
            masses = make_density(found.name, edges, **parameters).masses(edges)
            if not float(masses.sum()) > 0:
                raise ValueError(
                    f"density {found.name!r} with {density_args} has no mass on this schedule."
                )
            uniform = torch.full_like(masses, 1 / len(masses))
            mass, ones = compose(masses / masses.sum(), uniform, share, 0.0)
            self._cdfs[key] = tables(mass, ones)[0]
        return self._cdfs[key]

    def _through(self, cdf: Tensor, w: Tensor) -> Tensor:
        """The inverse cdf at w, linear within each step, as diffusers' u."""
        count = len(cdf)
        index = torch.searchsorted(cdf, w, right=True)
        low = torch.cat([cdf.new_zeros(1), cdf])[index]
        within = (w - low) / (cdf[index] - low)
        margin = max(_MARGIN, count * 2.0**-22)
        fraction = (index + margin + (1 - 2 * margin) * within) / count
        return fraction if self.reversed_sigmas else 1 - fraction


for_scheduler = ForScheduler
"""The same, as the changed lines of a script call it."""
_BOUND: weakref.WeakKeyDictionary[Any, ForScheduler] = weakref.WeakKeyDictionary()


def compute_density_for_timestep_sampling(
    weighting_scheme: str,
    batch_size: int | Slots,
    logit_mean: float | None = None,
    logit_std: float | None = None,
    mode_scale: float | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    *,
    scheduler: Any = None,
    **options: Any,
) -> Tensor:
    """Draw u in [0, 1) for the descending timesteps of ``scheduler``, default flow matching on 1000
    levels without a shift.

    ``options`` are those of :meth:`ForScheduler.compute_density_for_timestep_sampling`, which says
    the rest, errors too; the parameters of a density are among them. Calls are counted for each
    scheduler.
    """
    laws = (logit_mean, logit_std, mode_scale)
    return bound(scheduler).compute_density_for_timestep_sampling(
        weighting_scheme, batch_size, *laws, device, generator, **options
    )


def compute_snr(noise_scheduler: Any, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio (alpha / sigma)^2 at timesteps of a scheduler.

    On variance preserving schedules it is diffusers' own function; on flow matching and EDM
    schedules the timestep is looked up in the scheduler's table of training timesteps.

    Args:
        timesteps: any shape, as the scheduler's ``timesteps`` have them, before any rescaling.

    Returns:
        float32, the shape of ``timesteps``, on their device; 0 at zero terminal SNR.

    Raises:
        ValueError: a timestep that is not one of the scheduler's, or a scheduler without a table.
    """
    levels = bound(noise_scheduler).levels
    index = _indices(levels, timesteps)
    if levels.family == "vp":
        return training_utils.compute_snr(noise_scheduler, index.to(timesteps.device))
    return (levels.alpha / levels.sigma).square().float()[index].to(timesteps.device)


def bound(scheduler: Any) -> ForScheduler:
    """The functions for ``scheduler`` that all calls of the process share."""
    known = ForScheduler if scheduler is None else scheduler  # which can be a weak key
    if known not in _BOUND:
        _BOUND[known] = ForScheduler(scheduler)
    return _BOUND[known]


def _reversed(levels: NoiseLevels) -> NoiseLevels:
    """The levels of flow matching whose sigma multiplies the data."""
    if levels.family != "flow":
        raise ValueError(
            f"reversed_sigmas is for flow matching, and this schedule is {levels.family!r}."
        )
    return replace(
        levels,
        log_snr=-levels.log_snr.flip(0),
        alpha=levels.sigma.flip(0),
        sigma=levels.alpha.flip(0),
        timesteps=levels.timesteps.flip(0),
        edges=-levels.edges.flip(0),
        shift=None if levels.shift is None else 1 / levels.shift,
        _copies={},
    )


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"density parameters must be plain numbers and lists: {error}.") from None


def _indices(levels: NoiseLevels, timesteps: Tensor) -> Tensor:
    """Position of each timestep in the table, on the CPU."""
    wanted, known = timesteps.detach().cpu().double(), levels.timesteps.double()
    distance, index = (wanted[..., None] - known).abs().min(-1)
    # hundredths of the narrowest step: rounding to float32 passes, another schedule's do not
    strange = ~(distance <= 0.01 * known.diff().abs().min())
    if bool(strange.any()):
        raise ValueError(
            f"timestep {wanted[strange].flatten()[0].item()!r} is not one of the scheduler's "
            f"{len(known)} ({known.min().item():g} to {known.max().item():g}): pass timesteps as "
            "they come from the scheduler's table, before they are divided or cast."
        )
    return index
