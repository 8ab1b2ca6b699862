"""Whether transformers puts adapters into text encoders by the peft that is installed: the newest
one asks for a peft that is not released."""

from __future__ import annotations

import pytest

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.adapters import check_text_adapters

try:
    check_text_adapters()
    TEXT_ADAPTERS: tuple[str, ...] = ("--train_text_encoder",)  # wherever they may be had
except (ImportError, UsageError):
    TEXT_ADAPTERS = ()

needs_text_adapters = pytest.mark.skipif(not TEXT_ADAPTERS, reason="transformers refuses this peft")
