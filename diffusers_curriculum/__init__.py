"""Curricula and importance sampling over noise levels for training diffusers models.

The names below are imported when they are first asked for, so that the command line answers
`--help` and `--version` without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_curriculum.noise_levels import NoiseLevels
    from diffusers_curriculum.objective import Objective
    from diffusers_curriculum.randomness import Slots
    from diffusers_curriculum.samplers import (
        CurriculumTimestepSampler,
        DensityTimestepSampler,
        GradientNormTimestepSampler,
        InformationRateTimestepSampler,
        LossProportionalTimestepSampler,
        LossSecondMomentTimestepSampler,
        MovingTimestepSampler,
        PerSourceTimestepSampler,
        SequenceTimestepSampler,
        TimestepSample,
        TimestepSampler,
    )
    from diffusers_curriculum.weighting import loss_weights
    from diffusers_curriculum.weighting.learned import LearnedLossWeights, UncertaintyWeighting

__version__ = "0.2.0"

__all__ = [
    "CurriculumTimestepSampler",
    "DensityTimestepSampler",
    "GradientNormTimestepSampler",
    "InformationRateTimestepSampler",
    "LearnedLossWeights",
    "LossProportionalTimestepSampler",
    "LossSecondMomentTimestepSampler",
    "MovingTimestepSampler",
    "NoiseLevels",
    "Objective",
    "PerSourceTimestepSampler",
    "SequenceTimestepSampler",
    "Slots",
    "TimestepSample",
    "TimestepSampler",
    "UncertaintyWeighting",
    "loss_weights",
]

# Where a name comes from; all others come from `samplers`.
_MODULES = {
    "LearnedLossWeights": "weighting.learned",
    "NoiseLevels": "noise_levels",
    "Objective": "objective",
    "Slots": "randomness",
    "UncertaintyWeighting": "weighting.learned",
    "loss_weights": "weighting",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'samplers')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
