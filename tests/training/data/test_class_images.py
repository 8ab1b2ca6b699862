"""Which class images are missing, and what rows those that are there become."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_curriculum.training.data.class_images import beside, class_rows, missing_files
from diffusers_curriculum.training.tasks.text_to_image import TextToImage


def test_what_is_there_is_counted_and_the_rest_has_free_names(tmp_path: Path) -> None:
    folder = tmp_path / "class"
    assert [*missing_files(str(folder), 2)] == [0, 1]
    (folder / "inner").mkdir(parents=True)
    for name in ("a.png", "inner/b.png", "00001.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    wanted = {0: folder / "00000.png", 2: folder / "00002.png"}
    assert missing_files(str(folder), 5) == wanted
    assert missing_files(str(folder), 3) == {}
    assert missing_files(str(folder), 1) == {}


@pytest.mark.parametrize("several", [False, True])
def test_class_images_become_rows_like_the_others(
    tmp_path: Path, several: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")
    line = "--pretrained_model_name_or_path base --train_data_dir mine --image_column shot "
    line += f"--with_prior_preservation --class_data_dir {folder} --class_prompt dog "
    line += f"--num_class_images 2 --caption_column text --cache_dir {tmp_path / 'cache'}"
    args = TextToImage.command_line.parse(line.split(), machine=False)
    picture, text = ImageFeature(decode=False), Value("string")
    features = Features({"text": List(text) if several else text, "shot": picture, "mask": picture})
    cells = {"text": [["a", "b"]] if several else ["a"], "shot": [None], "mask": [None]}
    rows = Dataset.from_dict(cells, features=features)
    with caplog.at_level(logging.INFO):
        together = beside(rows, class_rows(args, rows, "text"))
    assert together.features == rows.features
    assert together["text"][1:] == ([["dog"], ["dog"]] if several else ["dog", "dog"])
    assert [Path(cell["path"]).name for cell in together["shot"][1:]] == ["0.png", "1.png"]
    assert "1 of the 3 images" in caplog.text
