"""Real pictures from inside packages, as rows of about unit standard deviation."""

from __future__ import annotations

import gzip
import io
import pickle  # noqa: TID251  (below, an unpickler that lets numpy's arrays through and nothing else)
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.cells import ConfigError

ANIMALS = "pip install --no-deps animal-mnist==0.4"
ICONS = "pip install --no-deps mkdocs-material==9.8.2 resvg-py==0.5.0"
WORDS = 64  # of captions: the commonest
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
FONTS = (
    *(f"DejaVuSans{face}" for face in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{face}" for face in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{face}" for face in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{face}" for face in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
_NUMPY = {("numpy", "ndarray"), ("numpy", "dtype")}


class Pictures(NamedTuple):
    """Rows (N, pixels) in float32 of mean 0 and standard deviation 1 over all, classes (N,); where
    the classes are captions, (classes, W) is 1 for the words of each."""

    rows: Tensor
    labels: Tensor
    classes: int
    words: Tensor | None = None

    def of(self, labels: list[int] | None) -> Pictures:
        """Those of some classes, which keep their numbers and scale."""
        if labels is None:
            return self
        kept = torch.isin(self.labels, torch.tensor(labels))
        return self._replace(rows=self.rows[kept], labels=self.labels[kept])


def _normalised(pixels: Any, labels: Any) -> Pictures:
    rows = torch.as_tensor(np.asarray(pixels, dtype=np.float32)).flatten(1)
    rows, labels = (rows - rows.mean()) / rows.std(), torch.as_tensor(np.asarray(labels)).long()
    return Pictures(rows, labels, int(labels.max()) + 1)


def digits() -> Pictures:
    """scikit-learn's 1,797 scanned digits, 8 x 8."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return _normalised(found.images, found.target)


def silhouettes() -> Pictures:
    """animal-mnist's 10,000 silhouettes of ten animals, 28 x 28, pooled to 14 x 14.

    Raises:
        ConfigError: the package is missing, or of another version.
    """
    folder = _package_of(ANIMALS) / "animal_mnist" / "data" / "Animal_MNIST"
    pixels, labels = (
        _Arrays(io.BytesIO(gzip.decompress((folder / f"animal_{what}_version_3.gz").read_bytes())))
        for what in ("data", "label")
    )
    small = F.avg_pool2d(torch.from_numpy(pixels.load()).float()[:, None], 2)
    return _normalised(small, labels.load())


class _Arrays(pickle.Unpickler):
    """Reads arrays of numpy; anything else is refused, as unpickling runs code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return getattr(np, name)


def _package_of(command: str) -> Path:
    """Where the first package is that a command of pip installs, once all of them are there."""
    places = []
    for name, version in (each.split("==") for each in command.split() if "==" in each):
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError as error:
            raise ConfigError(f"{name} {version} is missing: {command}") from error
        if package.version != version:
            raise ConfigError(f"pictures need {name} {version}, not {package.version}: {command}")
        places.append(Path(str(package.locate_file(""))))
    return places[0]


def icons(size: int) -> Pictures:
    """The icons of Material Design in mkdocs-material, size x size, their names as captions.

    Raises:
        ConfigError: a package is missing, or of another version.
    """
    folder = _package_of(ICONS) / "material" / "templates" / ".icons" / "material"
    files = sorted(folder.glob("*.svg"))
    return captioned([_rendered(file, size) for file in files], [file.stem for file in files])


def _rendered(file: Path, size: int) -> np.ndarray:
    """(size, size) how much of each pixel a drawing covers."""
    import resvg_py  # type: ignore[import-not-found]
    from PIL import Image

    drawn = resvg_py.svg_to_bytes(
        svg_path=str(file), width=size, height=size, skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(drawn)).getchannel("A"))


def captioned(pixels: Sequence[np.ndarray], names: Sequence[str]) -> Pictures:
    """Pictures (H, W) by names such as "airplane-landing": those with a word that is among the
    :data:`WORDS` commonest; what is left of their names is the caption."""
    found = [{*name.split("-")} for name in names]
    counts = Counter(sorted(word for words in found for word in words))
    common = [word for word, _ in counts.most_common(WORDS)]
    bags = torch.tensor([[float(word in words) for word in common] for words in found])
    known = bags.any(1)
    words, labels = bags[known].unique(dim=0, return_inverse=True)
    return _normalised(np.stack(pixels)[known.numpy()], labels)._replace(words=words)


def glyphs() -> Pictures:
    """Letters and digits of matplotlib's fonts, 16 x 16, each in three sizes and nine places."""
    places = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    pixels, labels = [], []
    for font in FONTS:
        for label, character in enumerate(ALPHABET):
            for points in (12, 13, 14):
                drawn = _drawn(font, character, points)
                pixels += [np.roll(drawn, place, (0, 1)) for place in places]
                labels += [label] * len(places)
    return _normalised(np.stack(pixels), labels)


def _drawn(font: str, character: str, points: int) -> np.ndarray:
    """(16, 16) one character in the middle."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    face = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")))
    face.set_size(points, 72)
    face.set_text(character, 0.0)
    face.draw_glyphs_to_bitmap(antialiased=True)
    image = np.array(face.get_image())[:16, :16]
    canvas, (height, width) = np.zeros((16, 16), dtype=np.uint8), image.shape
    top, left = (16 - height) // 2, (16 - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas


DATA: dict[str, Callable[[], Pictures]] = {
    "digits": digits,
    "silhouettes": silhouettes,
    "glyphs": glyphs,
    "icons": partial(icons, 16),
    "icons_64": partial(icons, 64),
}


@cache
def pictures(name: str) -> Pictures:
    """The data set of that name; ConfigError for others."""
    if name not in DATA:
        raise ConfigError(f"there are no pictures {name!r}: choose from {', '.join(DATA)}.")
    return DATA[name]()
