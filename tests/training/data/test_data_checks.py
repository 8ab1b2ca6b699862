"""A missing column comes with its remedy, a wrong caption with what it is."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from diffusers_curriculum.models.tiny import caption_tokenizer
from diffusers_curriculum.training.data import columns
from diffusers_curriculum.training.data.checks import caption_fault
from diffusers_curriculum.training.data.columns import (
    check_caption_column,
    check_image_column,
    warn_of_long_captions,
)
from diffusers_curriculum.training.errors import UsageError


@pytest.mark.parametrize("caption", ["", "text", ["a"], ("a", "b"), np.array(["a", "b"])])
def test_usable_captions(caption):
    assert caption_fault(caption) is None


@pytest.mark.parametrize(
    ("caption", "shown"),
    [(7, "7 is neither"), ({"en": "a"}, "neither"), (["a", 2], "holds 2"), (["a", ["b"]], "holds")],
)
def test_unusable_captions(caption, shown):
    assert shown in str(caption_fault(caption))


KINDS = Features(
    {
        "image": ImageFeature(),
        "text": Value("string"),
        "many": List(Value("large_string")),
        "score": Value("float32"),
        "scores": List(Value("int64")),
    }
)


def check_columns(image, caption):
    check_image_column(KINDS, image)
    check_caption_column(KINDS, caption)


@pytest.mark.parametrize("caption", ["text", "many"])
def test_good_columns_pass(caption):
    check_columns("image", caption)


@pytest.mark.parametrize(
    ("image", "caption", "shown"),
    [
        ("img", "text", "--image_column 'img' is not a column.*image, text, many, score"),
        ("image", "caption", "--caption_column 'caption' is not a column.*image, text, many"),
        ("score", "many", "--image_column 'score' holds Value.*not images.*image \\(Image"),
        ("image", "score", "--caption_column 'score' holds Value.*neither strings nor lists"),
        ("image", "scores", "--caption_column 'scores' holds List.*neither strings nor lists"),
        ("image", "image", "--caption_column 'image' holds Image.*neither strings nor lists"),
    ],
)
def test_wrong_columns_are_named_with_the_columns_found(image, caption, shown):
    with pytest.raises(UsageError, match=shown):
        check_columns(image, caption)


def test_captions_that_will_be_cut_are_counted_once(caplog):
    tokenizer = caption_tokenizer(["a b c d e f g h"], max_length=6)  # 4 words between two marks
    texts = [["a b c d"], ["a b c d e"], ["a", "a b c d e f g h"], ["a"], ["h"]] * 500
    rows = Dataset.from_dict({"text": texts})
    with caplog.at_level(logging.WARNING):
        warn_of_long_captions(rows, "text", tokenizer)
    (line,) = caplog.messages
    assert line.startswith("1000 of 2500 samples have a caption of more than the 6 tokens")
    assert line.endswith("the longest is that of row 2, with 10: 'a b c d e f g h'")
    caplog.clear()
    warn_of_long_captions(rows.select([0, 3]), "text", tokenizer)
    assert not caplog.messages


def test_of_very_many_captions_some_are_looked_at(caplog, monkeypatch):
    monkeypatch.setattr(columns, "_LOOKED_AT", 1000)
    tokenizer = caption_tokenizer(["a b c d e f g h"], max_length=6)
    rows = Dataset.from_dict({"text": ["a", "h", "a b c d e f g h", "b"] * 625})
    with caplog.at_level(logging.WARNING):
        warn_of_long_captions(rows, "text", tokenizer)
    (line,) = caplog.messages
    long = [row for row in range(0, 2500, 3) if row % 4 == 2]
    assert line.startswith(f"{len(long)} of 834 samples, of 2500, have a caption of more than the")
    assert f"that of row {long[0]}, with 10" in line
