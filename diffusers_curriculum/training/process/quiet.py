"""Lines of other libraries that say nothing to a user of this one."""

from __future__ import annotations

import logging


def without_torchvision_lines() -> None:
    """Drop transformers' lines on a torchvision that is not installed: no command here uses what
    they are about. To be called by a program, before diffusers' pipelines are imported."""
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed)" not in record.getMessage()
