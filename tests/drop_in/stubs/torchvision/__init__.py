"""A stand-in for the little of torchvision that diffusers' training scripts use.

Only for running those scripts in tests, where torchvision itself may be missing.
"""

from torchvision import transforms

__all__ = ["transforms"]
