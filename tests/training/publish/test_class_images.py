"""Class images: each a function of seed and number, drawn in the precision that was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.publish.class_images import draw_class_images
from diffusers_curriculum.training.tasks.text_to_image import TextToImage


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    families()["sd"].save_tiny(folder)
    return folder


def drawn(base: Path, folder: Path, *more: object, numbers: range, seed: int = 3) -> list[float]:
    """The pixels of some class images."""
    family = families()["sd"]
    line = ("--pretrained_model_name_or_path", base, "--train_data_dir", "mine", *more)
    line += ("--with_prior_preservation", "--class_data_dir", folder, "--class_prompt", "a dog")
    task = TextToImage()
    args = task.parse([*map(str, line)], machine=False)
    scheduler = family.load_schedulers(args)[1]
    before = dict(vars(scheduler))
    files = {number: folder / f"{number}.png" for number in numbers}
    tokenizers = family.load_tokenizers(args)
    draw_class_images(
        args,
        family,
        files,
        tokenizers=tokenizers,
        scheduler=scheduler,
        seed=seed,
        device=torch.device("cpu"),
    )
    assert vars(scheduler).keys() == before.keys()
    assert scheduler.num_inference_steps == before["num_inference_steps"]
    images = (np.asarray(Image.open(path), dtype=float) for path in files.values())
    return np.stack([*images]).flatten().tolist()


def test_an_image_is_a_function_of_seed_and_number(base: Path, tmp_path: Path) -> None:
    together = drawn(base, tmp_path / "a", "--sample_batch_size", 3, numbers=range(3))
    alone = drawn(base, tmp_path / "b", "--sample_batch_size", 1, numbers=range(1, 3))
    each = len(together) // 3
    assert alone == pytest.approx(together[each:], abs=1)  # a batch may round otherwise
    assert alone[:each] != pytest.approx(alone[each:], abs=1)
    other = drawn(base, tmp_path / "c", numbers=range(1), seed=4)
    assert other != pytest.approx(together[:each], abs=1)


def test_the_precision_is_that_of_the_flag(base: Path, tmp_path: Path) -> None:
    exact, half = (
        drawn(base, tmp_path / name, "--prior_generation_precision", name, numbers=range(2))
        for name in ("fp32", "bf16")
    )
    assert half != exact
    kinds, seed = (torch.float32, torch.bfloat16), torch.Generator().manual_seed
    one, other = (torch.randn(64, generator=seed(0), dtype=kind).float() for kind in kinds)
    if torch.allclose(one, other, atol=0.1):  # torch 2.6 draws other numbers in bfloat16
        assert half == pytest.approx(exact, abs=60)


def test_a_scheduler_that_cannot_draw_is_told_before_models_are_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(families()["sd"])
    monkeypatch.setattr(kind, "sampling_fault", lambda family, scheduler: "it cannot")
    with pytest.raises(UsageError, match=r"cannot draw class images \(it cannot\): put 2 more"):
        drawn(base, tmp_path / "none", numbers=range(2))
    assert not (tmp_path / "none").exists()
