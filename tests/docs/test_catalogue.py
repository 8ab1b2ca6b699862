"""The catalogue in docs is what the registries say, and each entry has a picture of it."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_curriculum.catalogue import Entry
from diffusers_curriculum.densities import DENSITIES
from diffusers_curriculum.samplers import SAMPLERS, TimestepSampler
from diffusers_curriculum.weighting import WEIGHTINGS
from docs import generate_catalogue as generator

ENTRIES = list(generator.entries())
IDS = [f"{kind}-{entry.name}" for kind, entry in ENTRIES]
REMEDY = "run `python -m docs.generate_catalogue`"


def test_the_catalogue_is_up_to_date() -> None:
    written = (generator.DOCS / "catalogue.md").read_text("utf-8")
    assert written == generator.catalogue(), REMEDY


def test_the_gallery_is_up_to_date() -> None:
    written = (generator.GALLERY / "README.md").read_text("utf-8")
    assert written == generator.gallery(), REMEDY


def test_everything_registered_has_a_row() -> None:
    row = re.compile(r"^\| \[`(\w+)`\]\(gallery/README\.md#(\w+)-(\w+)\)", re.MULTILINE)
    rows = row.findall(generator.catalogue())
    named = [(kind, name) for name, kind, anchor in rows if name == anchor]
    assert len(named) == len(rows) == len(set(named))
    assert {name for kind, name in named if kind == "density"} == set(DENSITIES)
    assert {name for kind, name in named if kind == "weighting"} == {*WEIGHTINGS, "uncertainty"}
    assert {name for kind, name in named if kind == "sampler"} == set(SAMPLERS)
    concrete = [
        kind
        for kind in TimestepSampler.kinds().values()
        if kind.__module__.startswith("diffusers_curriculum.")
        and kind.__module__ in sys.modules  # not one that another test has forgotten
    ]
    assert set(concrete) == set(SAMPLERS.values())


@pytest.mark.parametrize(("kind", "entry"), ENTRIES, ids=IDS)
def test_every_entry_is_told_in_full(kind: str, entry: Entry) -> None:
    assert entry.formula
    assert entry.source
    families = entry.families.replace(",", " ").split()
    assert set(families) <= {"all", "vp", "flow", "edm"}
    assert (entry.name + entry.formula + entry.source + entry.note).isascii()


@pytest.mark.parametrize(("kind", "entry"), ENTRIES, ids=IDS)
def test_defaults_are_those_of_the_code(kind: str, entry: Entry) -> None:
    told, _, optional = generator.defaults(kind, entry).partition("optional ")
    told = told.removesuffix("; ")
    parameters = inspect.signature(entry.make).parameters
    for piece in filter(None, re.split(r", (?=\w+(?:=|,|$))", told)):
        name, equals, value = piece.partition("=")
        default = parameters[name].default
        if not equals:
            assert default is inspect.Parameter.empty
        elif isinstance(default, float):
            assert float(value) == default
        elif isinstance(default, str | int):
            assert value == str(default)
    for name in filter(None, optional.split(", ")):
        assert parameters[name].default is None


@pytest.mark.parametrize(("kind", "entry"), ENTRIES, ids=IDS)
def test_every_entry_has_a_picture(kind: str, entry: Entry) -> None:
    path = generator.GALLERY / generator.picture_name(kind, entry)
    assert path.is_file(), f"{path} is missing: {REMEDY}"
    with Image.open(path) as image:
        assert image.size == (378, 234)
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 10


def test_there_is_no_picture_of_nothing() -> None:
    wanted = {generator.picture_name(kind, entry) for kind, entry in ENTRIES}
    assert {path.name for path in generator.GALLERY.glob("*.png")} <= wanted, REMEDY


def test_the_gallery_is_small() -> None:
    assert sum(path.stat().st_size for path in generator.GALLERY.iterdir()) < 2.5e6


def test_links_of_the_gallery_lead_somewhere() -> None:
    text = generator.gallery()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert not [t for t in targets if not (generator.GALLERY / t).exists()]
    anchors = set(re.findall(r'<a id="([^"]+)">', text))
    assert set(re.findall(r"README\.md#([\w-]+)", generator.catalogue())) == anchors


def test_a_run_writes_what_is_there_and_removes_what_is_not(tmp_path: Path) -> None:
    stale = tmp_path / "gallery" / "density-of_old.png"
    stale.parent.mkdir()
    stale.write_bytes(b"")
    (drawn,) = generator.write(tmp_path, only=["density-laplace.png"])
    assert not stale.exists()
    assert drawn == tmp_path / "gallery" / "density-laplace.png"
    assert (tmp_path / "catalogue.md").read_text("utf-8") == generator.catalogue()
    pytest.importorskip("matplotlib", minversion="3.11")  # which sets text as in what is kept
    kept = generator.GALLERY / "density-laplace.png"
    with Image.open(drawn) as new, Image.open(kept) as old:
        pixels = [np.asarray(image.convert("L"), dtype=float) for image in (new, old)]
    # fonts may differ a little from one version to the next
    assert np.abs(pixels[0] - pixels[1]).mean() < 2, REMEDY
