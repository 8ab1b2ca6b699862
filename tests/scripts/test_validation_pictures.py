"""Pictures on the way: the same noise each time, and a CLIP score where one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_curriculum.metrics.clip_score import ClipScore
from diffusers_curriculum.training.publish.metrics_record import read_metrics
from diffusers_curriculum.training.publish.publisher import PipelinePublisher
from tests.metrics.tiny_clip import save_clip
from tests.scripts.every_script import SCRIPTS, STEPS, Script
from tests.scripts.small_runs import recorded

PICTURES = {
    "text_to_image": ("--validation_prompts", "a bee", "a zebra"),
    "class_conditional": ("--validation_images_per_class", 1, "--validation_inference_steps", 2),
    "unconditional": ("--eval_batch_size", 2, "--ddpm_num_inference_steps", 2),
}
ONE_PROMPT = ("--validation_prompt", "a bee", "--num_validation_images", 2)
TEXT = [name for name in SCRIPTS if name.startswith("text") or name == "flow"]


def run(script: Script, *more: object) -> tuple[dict[int, list[np.ndarray]], Any]:
    """The pictures of a run by step, and what was recorded of it."""
    shown: dict[int, list[np.ndarray]] = {}
    show = PipelinePublisher._show

    def noting(publisher: Any, tag: str, images: Any, done: int) -> None:
        shown[done] = [np.asarray(image) for image in images]
        show(publisher, tag, images, done)

    drawn = PICTURES.get(script.name, ONE_PROMPT)
    words = script.argv(*drawn, "--validation_steps", 5, *more)
    at = words.index("--seed")
    words = [word for word in (*words[:at], *words[at + 2 :]) if word != "--no_pictures"]
    with (
        mock.patch.object(PipelinePublisher, "_show", noting),
        mock.patch.object(script, "argv", return_value=words),
        recorded() as record,
    ):
        script.main()
    return shown, record


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", [*TEXT, "class_conditional", "unconditional"])
def test_they_begin_with_the_same_noise_and_are_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that stay give the same pictures, without a --seed, too."""
    torch.set_num_threads(1)
    script = Script(name, tmp_path, monkeypatch)
    clip = ("--validation_clip_score", tmp_path / "clip") if name in TEXT else ()
    if clip:
        save_clip(tmp_path / "clip")
    shown, record = run(script, "--learning_rate", 0, *clip)
    assert [*shown] == [5, STEPS]
    for first, last in zip(*shown.values(), strict=True):
        np.testing.assert_allclose(first.astype(int), last.astype(int), atol=1)
    if not clip:
        return
    lines = read_metrics(script.output / "clip_score.jsonl")
    found = {step: values for step, values in record.logged if "validation/clip_score" in values}
    assert [*lines] == [*found] == [5, STEPS]
    prompts = ["a bee", "a zebra"] if name == "text_to_image" else ["a bee"] * 2
    images = [Image.fromarray(pixels) for pixels in shown[STEPS]]
    score = ClipScore(str(tmp_path / "clip"))(images, prompts)
    assert lines[STEPS]["clip_score"] == pytest.approx(score)
    assert found[STEPS]["validation/clip_score"] == pytest.approx(score)
    assert lines[STEPS]["pictures"] == 2
