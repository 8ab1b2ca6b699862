"""The pictures of the rooms and the table of flags are what the code says."""

from __future__ import annotations

from docs import generate_architecture as generator
from tests.structure.layout import ROOMS

REMEDY = "run `python -m docs.generate_architecture`"


def test_the_pictures_are_up_to_date() -> None:
    written = (generator.DOCS / "architecture.md").read_text("utf-8")
    assert written.count("```mermaid") == 2
    assert written == generator.architecture(written), REMEDY


def test_the_flags_are_up_to_date() -> None:
    assert (generator.DOCS / "flags.md").read_text("utf-8") == generator.flags(), REMEDY


def test_every_room_is_in_the_picture() -> None:
    picture = generator.picture("diffusers_curriculum/training")
    assert all(f" {room}\n" in picture or f" {room} -->" in picture for room in ROOMS)


def test_an_arrow_that_others_imply_is_left_out() -> None:
    imports = generator.rooms("diffusers_curriculum/training")
    assert "errors" in imports["loop"]
    assert "    loop --> errors" not in generator.picture("diffusers_curriculum/training")


def test_every_flag_has_a_row_in_each_script() -> None:
    text = generator.flags()
    for line in generator.SCRIPTS.values():
        assert all(f"| `--{flag.name}` |" in text for flag in line.flags)
