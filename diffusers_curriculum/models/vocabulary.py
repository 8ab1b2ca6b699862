"""A CLIP tokenizer made from captions, without any download."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for bytes in CLIP's byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def caption_tokenizer(
    captions: Iterable[str], *, max_length: int, vocabulary_size: int = 1024
) -> CLIPTokenizer:
    """Return a CLIPTokenizer for which each frequent word of the captions is one token.

    Words are merged left to right, most frequent first, while `vocabulary_size` has room. All
    bytes are in the vocabulary, so any other text can be encoded too.
    """
    alphabet = byte_alphabet()
    vocabulary = [*alphabet, *(char + "</w>" for char in alphabet)]
    known, merges = set(vocabulary), []
    room = vocabulary_size - len(vocabulary) - 2
    for word in _frequent_words(captions, max_length):
        steps = [(left, right) for left, right in _merge_steps(word) if left + right not in known]
        if len(steps) > room - len(merges):
            continue
        merges += steps
        known.update(left + right for left, right in steps)
    vocabulary += [left + right for left, right in merges] + [START, END]
    ids = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_length)


def _frequent_words(captions: Iterable[str], max_length: int) -> list[str]:
    """Return the distinct words of the captions, most frequent first, ties by alphabet."""
    splitter = CLIPTokenizer(model_max_length=max_length).backend_tokenizer
    counts: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        text = splitter.normalizer.normalize_str(caption)
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(text):
            counts[word] += times
    return sorted(counts, key=lambda word: (-counts[word], word))


def _merge_steps(word: str) -> list[tuple[str, str]]:
    """Return the pairs that grow `word` by one character each, the last one marked `</w>`."""
    parts = [*word[:-1], word[-1] + "</w>"]
    return [("".join(parts[:i]), parts[i]) for i in range(1, len(parts))]
