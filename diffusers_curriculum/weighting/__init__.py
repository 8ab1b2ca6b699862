"""Loss weights as functions of log-SNR and prediction type.

A weighting is defined once, by the logarithm of its weight on the squared error of x0, and carried
to the network's own target by :mod:`~diffusers_curriculum.weighting.conversion`.
"""

from diffusers_curriculum.weighting import folk, formulas
from diffusers_curriculum.weighting.conversion import TARGETS, softplus, to_target
from diffusers_curriculum.weighting.formulas import WEIGHTINGS, register
from diffusers_curriculum.weighting.tables import MEASURES, log_weight, loss_weights

__all__ = [
    "MEASURES",
    "TARGETS",
    "WEIGHTINGS",
    "folk",
    "formulas",
    "log_weight",
    "loss_weights",
    "register",
    "softplus",
    "to_target",
]
