"""Small real models, built from configs: no download is needed to try a training run."""

from diffusers_curriculum.models.image_folder import TinyModelError
from diffusers_curriculum.models.tiny import MINUSCULE, TinyReport, TinySizes, make_tiny_pipeline

__all__ = ["MINUSCULE", "TinyModelError", "TinyReport", "TinySizes", "make_tiny_pipeline"]
