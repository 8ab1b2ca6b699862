"""Files whose pixels are sound train, whatever stands beside them; alpha, grey, other formats."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from diffusers_curriculum.models import image_files
from diffusers_curriculum.training.data.bad_samples import usable_rows
from diffusers_curriculum.training.data.checks import image_fault
from diffusers_curriculum.training.data.decoding import Pixels, decode_image, decode_precisely
from diffusers_curriculum.training.data.transforms import ImageTransform

COLOURS = np.random.Generator(np.random.Philox(5)).integers(0, 256, (4, 3, 3), dtype=np.uint8)
PICTURE = Image.fromarray(COLOURS)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cell(image: Image.Image | bytes, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    content = image if isinstance(image, bytes) else encoded(image, kind, **options)
    return {"path": None, "bytes": content}


def big_text(**options: Any) -> bytes:
    """A PNG with a text of two megabytes, packed: more than Pillow unpacks."""
    texts = PngInfo()
    texts.add_text("prompt", "x" * 2_000_000, zip=True)
    return encoded(PICTURE, pnginfo=texts, **options)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


BROKEN_EXIF = b"Exif\0\0this is no TIFF header"
ODD = {
    "EXIF": encoded(PICTURE, exif=BROKEN_EXIF),
    "text": big_text(),
    "text and EXIF": big_text(exif=BROKEN_EXIF),
    "profile": encoded(PICTURE, icc_profile=bytes(2_000_000)),
}


# -- sound pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("stored", ["file", "bytes"])
def test_sound_pixels_are_taken_and_told(tmp_path: Path, kind: str, stored: str) -> None:
    odd, noted = cell(ODD[kind]), list[str]()
    if stored == "file":
        (tmp_path / "a.png").write_bytes(ODD[kind])
        odd = {"path": str(tmp_path / "a.png"), "bytes": None}
    assert np.array_equal(np.asarray(decode_image(odd, noted=noted)), COLOURS)
    assert np.array_equal(np.asarray(decode_image(odd)), COLOURS)
    told = "; ".join(noted)
    assert ("EXIF cannot be read" in told) == ("EXIF" in kind)
    assert ("a text or profile in it cannot be read" in told) == (kind != "EXIF")


def test_a_jpeg_with_broken_exif_is_taken() -> None:
    grey, noted = Image.new("RGB", (16, 8), (90, 90, 90)), list[str]()
    found = decode_image(cell(grey, "JPEG", exif=BROKEN_EXIF), noted=noted)
    assert found.size == (16, 8)
    assert np.abs(np.asarray(found).astype(int) - 90).max() <= 2


def test_which_way_is_up_outlives_a_text_that_is_too_big() -> None:
    found = decode_image(cell(big_text(exif=turned(6))))
    assert np.array_equal(np.asarray(found), np.rot90(COLOURS, -1))


def test_broken_pixels_stay_broken(tmp_path: Path) -> None:
    for content in (big_text()[:-30], encoded(PICTURE)[:-30]):
        with pytest.raises(Exception, match=r"truncated|broken|Truncated|too large"):
            decode_image(cell(content))
    with pytest.raises(FileNotFoundError):
        decode_image({"path": str(tmp_path / "gone.png"), "bytes": None})


def test_odd_images_are_trained_on_with_one_warning_in_every_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells = [cell(PICTURE), *map(cell, ODD.values())]
    kind = Features({"image": ImageFeature(decode=False)})
    rows = Dataset.from_dict({"image": cells}, features=kind)
    for _ in range(2):  # the second knows the good image
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert usable_rows(rows, output_dir=tmp_path, progress=False) is rows
        (line,) = caplog.messages
        assert line.startswith("4 images are trained on as they are stored: row 1: its EXIF cannot")


# -- colours ---------------------------------------------------------------------------------------


def transparent() -> Image.Image:
    """Red where it is opaque, half and not at all."""
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[..., 0], pixels[0, :, 3] = 200, (255, 128, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("background", "expected"),
    [
        (None, [[200, 0, 0]] * 3),
        ("white", [[200, 0, 0], [227, 127, 127], [255, 255, 255]]),
        ("#0000ff", [[200, 0, 0], [100, 0, 127], [0, 0, 255]]),
    ],
)
def test_alpha_over_a_colour(background: str | None, expected: list[list[int]]) -> None:
    found = np.asarray(decode_image(cell(transparent()), Pixels(background=background)))
    assert np.abs(found[0].astype(int) - expected).max() <= 1


def test_every_kind_of_transparency_is_seen() -> None:
    palette, white = Image.new("P", (2, 1)), Pixels(background="white")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    found = np.asarray(decode_image(cell(palette, transparency=bytes([0, 255])), white))
    assert found[0].tolist() == [[255, 255, 255], [200, 100, 50]]
    for image, key in ((Image.new("L", (1, 1), 7), 7), (Image.new("RGB", (1, 1), (7, 8, 9)), None)):
        content = cell(image, transparency=(7, 8, 9) if key is None else key)
        assert np.asarray(decode_image(content, white))[0, 0].tolist() == [255, 255, 255]
    grey = Image.new("LA", (1, 1), (7, 0))
    assert np.asarray(decode_image(cell(grey), white))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "LA", "P", "I;16", "1"])
def test_images_of_any_mode_become_those_of_the_network(
    mode: str, channels: int, kind: str
) -> None:
    image = Image.new("L" if kind == "I;16" else kind, (9, 8), 1).convert(kind)
    transform = ImageTransform(8, center_crop=True, pixels=Pixels(mode))
    found = transform(transform.decode(cell(image)), 0, 0, 1)
    deep = transform.precise(transform.decode_precisely(cell(image)), 0, 0, 1)
    assert found.shape == deep.shape == (channels, 8, 8)
    torch.testing.assert_close(found, deep, rtol=0, atol=2 / 255)
    if mode == "RGBA" and kind in ("RGB", "L", "I;16"):
        assert (found[3] == 1).all()


def test_deep_grey_keeps_its_precision_in_one_channel() -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 3 + 20000
    found = decode_precisely(cell(Image.fromarray(values)), Pixels("L"))
    assert found.shape == (8, 8, 1)
    assert len(np.unique(found)) == 64


# -- formats ---------------------------------------------------------------------------------------


def test_avif_is_read() -> None:
    assert features.check("avif")
    assert decode_image(cell(Image.new("RGB", (8, 8), (90, 90, 90)), "AVIF")).size == (8, 8)


PACKAGES = {"heic": "pillow-heif", "jxl": "pillow-jxl-plugin"}
# What the real package has: a module that registers a plugin of Pillow when it is imported.
JXL = """
from PIL import Image, PngImagePlugin


class JXLImageFile(PngImagePlugin.PngImageFile):
    format = "JXL"


Image.register_open("JXL", JXLImageFile, lambda head: head.startswith(b"\\x89PNG"))
Image.register_extension("JXL", ".jxl")
Image.register_mime("JXL", "image/jxl")
"""


@pytest.fixture
def codecs(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Pillow as it comes, without the packages for HEIC and JPEG XL; what is known of codecs is
    asked anew, before and after."""
    known = (image_files.register_codecs, image_files.is_image_suffix)
    for function in known:
        function.cache_clear()
    gone = ("HEIF", "JXL")
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in gone])
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k not in gone})
    suffixes = {k: v for k, v in Image.EXTENSION.items() if v not in gone}
    monkeypatch.setattr(Image, "EXTENSION", suffixes)
    monkeypatch.setattr(Image, "MIME", dict(Image.MIME))
    for name in [n for n in sys.modules if n.split(".")[0] in ("pillow_heif", "pillow_jxl")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(image_files, "find_spec", lambda name: None)
    yield monkeypatch
    monkeypatch.undo()
    for function in known:
        function.cache_clear()


def test_plugins_for_rare_formats_are_loaded_where_one_is_met(
    codecs: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    codecs.setattr(image_files, "find_spec", asked.append)
    codecs.setattr(Image, "init", lambda: asked.append("Pillow's own"))
    for name in ("a.png", "b.jpg", "c.JPEG", "d.gif", "metadata.jsonl", "metadata.csv", "b.txt"):
        (tmp_path / name).write_bytes(encoded(PICTURE))
    assert len(image_files.list_folder(tmp_path).images) == 4
    decode_image(cell(encoded(PICTURE)))
    assert asked == []
    image_files.is_image_suffix(".strange")
    assert asked == ["pillow_heif", "pillow_jxl", "Pillow's own"]


@pytest.mark.parametrize("suffix", PACKAGES)
def test_a_format_without_its_package_is_told(
    codecs: pytest.MonkeyPatch, tmp_path: Path, suffix: str
) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"something")
    fault = image_fault({"path": str(tmp_path / f"a.{suffix}"), "bytes": None}, 8, [])
    remedy = f"(pip install {PACKAGES[suffix]})"
    assert fault is not None
    assert f"cannot identify image file '{tmp_path}/a.{suffix}' {remedy}" in fault
    (told,) = image_files.list_folder(tmp_path).left_out
    assert told == f"Pillow cannot read .{suffix} files here {remedy}"


def test_heic_is_registered_where_its_package_is_installed(
    codecs: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heif: Any = ModuleType("pillow_heif")
    heif.register_heif_opener = lambda: Image.register_extensions("PNG", [".heic"])
    codecs.setitem(sys.modules, "pillow_heif", heif)
    codecs.setattr(image_files, "find_spec", lambda name: name == "pillow_heif")
    (tmp_path / "a.HEIC").write_bytes(encoded(PICTURE))
    found = image_files.list_folder(tmp_path)
    assert found.images == [str(tmp_path / "a.HEIC")]
    assert found.left_out == {}


def test_jpeg_xl_is_registered_where_its_package_is_installed(
    codecs: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "site" / "pillow_jxl").mkdir(parents=True)
    (tmp_path / "site" / "pillow_jxl" / "__init__.py").write_text(JXL)
    codecs.syspath_prepend(tmp_path / "site")
    codecs.setitem(sys.modules, "pillow_jxl", None)  # forgotten at the end
    del sys.modules["pillow_jxl"]
    codecs.setattr(image_files, "find_spec", lambda name: name == "pillow_jxl")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jxl").write_bytes(encoded(PICTURE))
    assert image_files.list_folder(tmp_path / "images").left_out == {}
    assert "JXL" in Image.OPEN


@pytest.mark.parametrize(("suffix", "module"), [("heic", "pillow_heif"), ("jxl", "pillow_jxl")])
def test_the_real_packages_decode(tmp_path: Path, suffix: str, module: str) -> None:
    """In a folder, and as bytes in a table."""
    pytest.importorskip(module)
    image_files.register_codecs()
    path = tmp_path / f"a.{suffix}"
    flat = Image.new("RGB", (16, 12), (90, 120, 30))
    best: dict[str, Any] = {"lossless": True} if suffix == "jxl" else {"quality": 100}
    flat.save(path, **best)
    assert image_files.list_folder(tmp_path).images == [str(path)]
    for source in ({"path": str(path), "bytes": None}, cell(path.read_bytes())):
        found = np.asarray(decode_image(source)).astype(int)
        assert found.shape == (12, 16, 3)
        assert np.abs(found - (90, 120, 30)).max() <= (0 if suffix == "jxl" else 3)
    half = path.read_bytes()[: path.stat().st_size // 2]
    assert image_fault(cell(half), 8, []) is not None


@pytest.mark.parametrize(("suffix", "module"), [("heic", "pillow_heif"), ("jxl", "pillow_jxl")])
def test_bytes_of_a_table_are_decoded_in_a_fresh_process(
    tmp_path: Path, suffix: str, module: str
) -> None:
    """Where no folder was listed that would have registered the packages."""
    pytest.importorskip(module)
    image_files.register_codecs()
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (16, 12), (90, 120, 30)).save(path)
    program = (
        "import sys; from diffusers_curriculum.training.data.decoding import decode_image; "
        "print(decode_image({'path': None, 'bytes': open(sys.argv[1], 'rb').read()}).size)"
    )
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "(16, 12)\n"
