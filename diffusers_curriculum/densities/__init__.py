"""Densities over log-SNR: pdf, cdf, sf and icdf in float64, and the catalogue of their names.

A law is written once, in log-SNR; :meth:`Density.masses` turns it into the exact probability of
each timestep of any schedule. A law of one's own takes five lines, and its name is then accepted
wherever a density is::

    @register("gumbel", formula="F(l) = exp(-exp(-l / b))", source="an example")
    @dataclass(frozen=True)
    class Gumbel(Density):
        b: float = positive(1.0)
        pdf = lambda self, l: torch.exp(-l / self.b - torch.exp(-l / self.b)) / self.b
        cdf = lambda self, l: torch.exp(-torch.exp(-l / self.b))

Parameters are dataclass fields, checked when the law is built: finite numbers, unless the field
says otherwise (:func:`positive`, or ``checks.checked``). What a law may add:

- ``icdf``, where it has a closed form; else the cdf is bisected to the last bit;
- ``sf``, so that the clean tail keeps digits that ``1 - cdf`` loses;
- ``placement``, the parameters that move and widen it, so that it can move over a run;
- ``support``, where all mass lies between two levels;
- a subclass of :class:`SymmetricDensity` gives the lower half only, and has both tails exact;
- a subclass of :class:`TimeDensity` is a law of the schedule's own time, 0 = cleanest timestep,
  given by ``time_pdf`` and ``time_cdf``;
- a subclass of :class:`ScheduleDensity` knows the schedule's ``edges``.

``DENSITIES.entry(name)`` tells formula, source, families and parameters of a telling instance.
"""

from diffusers_curriculum.densities import (
    laws,
    nested,
    points,
    published,
    recent,
    shifted,
    time_laws,
)
from diffusers_curriculum.densities.base import (
    DENSITIES,
    Density,
    Placement,
    ScheduleDensity,
    SymmetricDensity,
    make_density,
    on_clock,
    placement_of,
    portable_parameters,
    positive,
    register,
)
from diffusers_curriculum.densities.published import shift_from_pixels, shift_from_tokens
from diffusers_curriculum.densities.shifted import SHIFT_PRESETS, shift_from_dimensions
from diffusers_curriculum.densities.time_fraction import TimeDensity, UniformTimestep

__all__ = [
    "DENSITIES",
    "SHIFT_PRESETS",
    "Density",
    "Placement",
    "ScheduleDensity",
    "SymmetricDensity",
    "TimeDensity",
    "UniformTimestep",
    "laws",
    "make_density",
    "nested",
    "on_clock",
    "placement_of",
    "points",
    "portable_parameters",
    "positive",
    "published",
    "recent",
    "register",
    "shift_from_dimensions",
    "shift_from_pixels",
    "shift_from_tokens",
    "shifted",
    "time_laws",
]
