"""Loss weights as functions of log-SNR and prediction type.

A weighting is defined once, by the logarithm of its weight on the squared error of x0, and carried
to the network's own target by :func:`to_target`.
"""

from diffusers_curriculum.weighting import trainers
from diffusers_curriculum.weighting.formulas import TARGETS, WEIGHTINGS, register, to_target
from diffusers_curriculum.weighting.tables import MEASURES, log_weight, loss_weights

__all__ = [
    "MEASURES",
    "TARGETS",
    "WEIGHTINGS",
    "log_weight",
    "loss_weights",
    "register",
    "to_target",
    "trainers",
]
