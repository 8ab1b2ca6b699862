"""Densities over log-SNR: pdf, cdf, sf and icdf in float64.

A law is written once, in log-SNR; :meth:`Density.masses` turns it into the exact probability of
each timestep of any schedule.  A new law is a subclass of :class:`SymmetricDensity` with three
one-line methods, or of :class:`Density`, decorated with ``@register("name")``.
"""

from diffusers_curriculum.densities.base import (
    DENSITIES,
    Density,
    SymmetricDensity,
    make_density,
    positive,
    register,
)
from diffusers_curriculum.densities.laws import (
    Cauchy,
    Cosine,
    CosineScaled,
    CosineShifted,
    Laplace,
    Normal,
)
from diffusers_curriculum.densities.reference import UniformTimestep

__all__ = [
    "DENSITIES",
    "Cauchy",
    "Cosine",
    "CosineScaled",
    "CosineShifted",
    "Density",
    "Laplace",
    "Normal",
    "SymmetricDensity",
    "UniformTimestep",
    "make_density",
    "positive",
    "register",
]
