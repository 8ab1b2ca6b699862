"""What a subcommand hands back."""

from __future__ import annotations

from typing import NamedTuple


class Answer(NamedTuple):
    """What a subcommand says, and its exit status."""

    text: str
    status: int = 0
