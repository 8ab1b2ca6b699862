"""What a network is told of captions: encoded as they come, or once, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from accelerate.utils import send_to_device

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.cache.captions import CachedCaptions, cache_captions
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import Conditioning, ModelFamily
from diffusers_curriculum.training.process.memory import lent


class CaptionEncoder:
    """Encodes the captions of a batch.

    Args:
        family: of the models.
        models: their text encoders are used, on ``device``.
        encode: ``(models, tokens) -> conditioning``; default the family's own.
        offload: text encoders wait on the host, but while they are used.
        kept: what is told of captions that were encoded before; samples then hold a ``caption``,
            and no tokens.
    """

    def __init__(
        self,
        family: ModelFamily,
        models: Components,
        device: torch.device,
        encode: Callable[[Components, Mapping[str, Any]], Conditioning] | None = None,
        *,
        offload: bool = False,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        self.family, self.models, self.device = family, models, device
        self.encode, self.offload = encode or family.encode_text, offload
        self.kept = kept or {}

    def __call__(self, batch: Mapping[str, Any]) -> Conditioning:
        """What the network is told of the captions of a batch that is on the device."""
        if not self.kept:
            return self.encoded(batch)
        missing = [caption for caption in batch["caption"] if caption not in self.kept]
        if missing:
            raise UsageError(f"--cache_text_embeddings: {missing[0]!r} was not encoded before.")
        joined = self.family.joined([self.kept[caption] for caption in batch["caption"]])
        told: Any = send_to_device(joined, self.device, non_blocking=True)
        return told

    def encoded(self, tokens: Mapping[str, Any]) -> Conditioning:
        """What the network is told of the tokens of a batch, by the text encoders."""
        encoders, tokens = self.models.encoders.values(), send_to_device(tokens, self.device)
        with torch.no_grad(), lent(self.device, *encoders, only=self.offload):
            return self.encode(self.models, tokens)


def kept_captions(
    captions: Iterable[str], load: Callable[[], CaptionEncoder], **where: Any
) -> CachedCaptions:
    """What is told of captions, encoded once and for all unless that was done before.

    Args:
        load: loads what encodes them, and is called if that is needed; nothing keeps it.
        where: for :func:`cache_captions`.
    """
    encoder = cache(load)

    def encode(captions: Sequence[str]) -> list[Conditioning]:
        family, models = encoder().family, encoder().models
        found: list[Conditioning] = []
        for first in range(0, len(captions), family.captions_at_once):
            some = captions[first : first + family.captions_at_once]
            told = encoder().encoded(family.tokenize(models.tokenizers, some))
            on_host: Any = send_to_device(told, "cpu")
            found += family.apart(on_host, len(some))
        return found

    return cache_captions(captions, encode, **where)


def phrasings(args: Arguments, *sources: Any) -> Iterator[str]:
    """All that samples of data sets, or of none, may be told: every phrasing of their captions, and
    nothing where some are left out."""
    for rows in filter(None, sources):
        for cell in rows[args.caption_column]:
            yield from [cell] if isinstance(cell, str) else cell
    if args.caption_dropout:
        yield ""


def as_they_are(captions: Sequence[str]) -> dict[str, list[str]]:
    """What stands in samples in the place of tokens, for captions that are encoded before."""
    return {"caption": [*captions]}
