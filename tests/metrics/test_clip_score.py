"""CLIPScore of tiny models against its formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_curriculum.metrics.clip_score import ClipScore
from diffusers_curriculum.metrics.preprocessing import FeatureNetworkError
from tests.metrics.tiny_clip import save_clip

CAPTIONS = ["a bee", "zebra", "an ant", "a very long caption that does not fit at all"]


def pictures(count: int, side: int = 16) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    shape = (count, side, side, 3)
    return [Image.fromarray(x) for x in draw.integers(0, 256, shape, dtype=np.uint8)]


def test_it_is_the_mean_of_cosines_that_are_not_below_zero(tmp_path: Path) -> None:
    model, tokenizer = save_clip(tmp_path)
    images = pictures(len(CAPTIONS))
    score, cosines = ClipScore(str(tmp_path)), []
    for image, caption in zip(images, CAPTIONS, strict=True):
        ids = tokenizer(caption, truncation=True, max_length=12, return_tensors="pt").input_ids
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            text = model.text_projection(model.text_model(ids).pooler_output)
            seen = model.visual_projection(model.vision_model((pixels - 0.5) / 0.5).pooler_output)
        cosines.append(float((text * seen).sum() / text.norm() / seen.norm()))
    assert min(cosines) < 0 < max(cosines)  # both kinds are there
    expected = 100 * sum(max(0, x) for x in cosines) / len(cosines)
    assert score(images, CAPTIONS) == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert score(images, CAPTIONS) == pytest.approx(expected, rel=1e-4)


def test_pictures_of_another_size_are_fitted(tmp_path: Path) -> None:
    save_clip(tmp_path)
    score = ClipScore(str(tmp_path))
    large = [image.resize((32, 32), Image.Resampling.NEAREST) for image in pictures(2)]
    assert score(large, CAPTIONS[:2]) == pytest.approx(score(pictures(2), CAPTIONS[:2]), abs=2)


@pytest.mark.parametrize(
    "missing", ["model.safetensors", "preprocessor_config.json", "config.json"]
)
def test_what_is_missing_is_told(tmp_path: Path, missing: str) -> None:
    save_clip(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FeatureNetworkError, match=str(tmp_path)):
        ClipScore(str(tmp_path))
