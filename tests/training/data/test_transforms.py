"""Decoding and geometry against values worked out by hand."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_curriculum.training.data.decoding import decode_image, decode_precisely
from diffusers_curriculum.training.data.transforms import (
    INTERPOLATIONS,
    ImageTransform,
    resized_size,
    to_tensor,
)
from diffusers_curriculum.training.errors import UsageError


def coordinates(width: int, height: int) -> Image.Image:
    """An image that tells where each pixel came from: red = x, green = y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def origin(pixels: torch.Tensor) -> tuple[int, int, bool]:
    """Return (left, top, mirrored) of a crop of `coordinates`."""
    values = ((pixels * 0.5 + 0.5) * 255).round().int()
    mirrored = bool(values[0, 0, 0] > values[0, 0, -1])
    return int(values[0].min()), int(values[1].min()), mirrored


def cell(image: Image.Image, kind: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"path": None, "bytes": buffer.getvalue()}


@pytest.mark.parametrize(
    ("width", "height", "resolution", "expected"),
    [
        (640, 427, 512, (767, 512)),  # 512 * 640 / 427 = 767.4
        (427, 640, 512, (512, 767)),
        (333, 500, 64, (64, 96)),  # 96.1
        (1000, 3, 10, (3333, 10)),
        (3, 1000, 10, (10, 3333)),
        (5, 3, 7, (11, 7)),  # 11.67: rounded down
        (100, 100, 7, (7, 7)),
        (1, 1, 512, (512, 512)),
        (512, 768, 512, (512, 768)),
    ],
)
def test_resized_size(width, height, resolution, expected):
    assert resized_size(width, height, resolution) == expected


@pytest.mark.parametrize(
    ("slack", "offset"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)]
)
def test_center_crop_rounds_half_to_even(slack, offset):
    transform = ImageTransform(8, center_crop=True)
    wide = transform(coordinates(8 + slack, 8), 0.99, 0.99, 0.0)
    tall = transform(coordinates(8, 8 + slack), 0.99, 0.99, 0.0)
    assert origin(wide) == (offset, 0, False)
    assert origin(tall) == (0, offset, False)


@pytest.mark.parametrize(
    ("u", "offset"), [(0.0, 0), (0.249, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1 - 2**-53, 3)]
)
def test_random_crop_takes_the_place_its_uniform_names(u, offset):
    transform = ImageTransform(8)
    assert origin(transform(coordinates(11, 8), 0.6, u, 0.0)) == (offset, 0, False)
    assert origin(transform(coordinates(8, 11), u, 0.6, 0.0)) == (0, offset, False)


def test_flip_mirrors_left_and_right_after_the_crop():
    flipping, plain = ImageTransform(8, random_flip=True), ImageTransform(8)
    image = coordinates(11, 8)
    assert origin(flipping(image, 0.0, 0.3, 0.499)) == (1, 0, True)
    assert origin(flipping(image, 0.0, 0.3, 0.5)) == (1, 0, False)
    assert torch.equal(flipping(image, 0.0, 0.3, 0.1), plain(image, 0.0, 0.3, 0.1).flip(-1))


def test_to_tensor_scales_to_minus_one_and_one():
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (0, 255, 51))
    pixels = to_tensor(image)
    assert pixels.shape == (3, 1, 2)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])
    assert pixels[:, 0, 1].tolist() == [-1.0, -1.0, -1.0]


def test_box_and_nearest_resizing_by_hand():
    grey = np.array([[0, 40, 100, 100], [80, 120, 20, 20]], dtype=np.uint8)
    image = Image.fromarray(grey).convert("RGB")
    boxed = ImageTransform(1, "box")(image, 0.0, 0.999, 0.0)  # right half: mean 60
    assert boxed.flatten().tolist() == pytest.approx([60 / 127.5 - 1] * 3)
    doubled = ImageTransform(4, "nearest")(image, 0.0, 0.0, 0.0)  # 8 x 4, leftmost 4 x 4
    expected = torch.from_numpy(grey[:, :2].repeat(2, 0).repeat(2, 1)).float() / 127.5 - 1
    torch.testing.assert_close(doubled[0], expected)


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_each_interpolation_is_the_pil_filter_of_its_name(name):
    noise = np.random.Generator(np.random.Philox(1)).integers(0, 256, (13, 29, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    found = ImageTransform(8, name, center_crop=True)(image, 0.0, 0.0, 0.0)
    pil = Image.Resampling["NEAREST" if name == "nearest_exact" else name.upper()]
    resized = image.resize((17, 8), pil)  # 8 * 29 / 13 = 17.8
    expected = to_tensor(resized.crop((4, 0, 12, 8)))  # round(4.5) = 4
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "shown"),
    [({"interpolation": "cubic"}, "'cubic'.*bicubic"), ({"resolution": 0}, "--resolution is 0")],
)
def test_wrong_options_are_refused(options, shown):
    with pytest.raises(UsageError, match=shown):
        ImageTransform(**options)


def test_exif_orientation_is_applied():
    image = coordinates(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    upright = decode_image(cell(image, exif=exif))
    assert upright.size == (10, 20)
    assert np.array_equal(np.array(upright), np.rot90(np.array(image), -1))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 257 * 10, 257 * 200, 65535]], dtype=np.uint16)
    found = np.array(decode_image(cell(Image.fromarray(grey))))
    assert found[0, :, 0].tolist() == [0, 10, 200, 255]
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "CMYK", "P", "I;16", "I"])
def test_every_usual_mode_becomes_rgb_without_a_warning(mode):
    image = Image.new("L" if mode == "I;16" else mode, (4, 4), 1).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "I") else "PNG"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(cell(image, kind)).mode == "RGB"


def test_palette_with_transparency_keeps_its_colours_without_a_warning():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_image(cell(image, transparency=bytes([0, 128])))
    assert np.array(found)[0].tolist() == [[10, 20, 30], [200, 100, 50]]


def test_pixels_of_unknown_range_are_refused():
    for pixels in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70000, np.int32)):
        with pytest.raises(ValueError, match="no known range"):
            decode_image(cell(Image.fromarray(pixels), "TIFF"))


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    assert decode_image(cell(coordinates(9, 11))).size == (9, 11)
    with warnings.catch_warnings():  # PIL itself only warns up to twice the limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="10 x 10 pixels are over the limit of 99"):
            decode_image(cell(coordinates(10, 10)))


def test_no_image_at_all():
    with pytest.raises(ValueError, match="no image"):
        decode_image({"path": None, "bytes": None})


# -- 16-bit images at their precision --------------------------------------------------------------


def grey16(values: np.ndarray) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_sixteen_bits_are_kept() -> None:
    values = np.arange(0, 64, dtype=np.uint16).reshape(8, 8) * 3 + 20000  # closer than 8 bits tell
    pixels = decode_precisely(grey16(values))
    made = ImageTransform(8, center_crop=True).precise(pixels, 0.0, 0.0, 1.0)
    expected = values.astype(np.float64) / 65535 * 2 - 1
    assert made.shape == (3, 8, 8)
    assert np.abs(made.numpy() - expected).max() < 1e-6
    assert len(np.unique(made.numpy())) == 64
    rounded = ImageTransform(8, center_crop=True)(decode_image(grey16(values)), 0.0, 0.0, 1.0)
    assert len(np.unique(rounded.numpy())) < 5


@pytest.mark.parametrize("draws", [(0.1, 0.9, 0.2), (0.8, 0.3, 0.7)])
def test_the_geometry_is_that_of_eight_bits(draws: tuple[float, float, float]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}
    transform = ImageTransform(12, "bilinear", random_flip=True)
    rounded = transform(decode_image(cell), *draws)
    precise = transform.precise(decode_precisely(cell), *draws)
    assert float((rounded - precise).abs().max()) <= 2.02 / 255  # PIL rounds twice, in [-1, 1]
