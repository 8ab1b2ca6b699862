"""Latents on disk: the bits of encoding on the fly, refusals, kills, and several processes."""

from __future__ import annotations

import io
import json
import os
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.randomness import host_generator
from diffusers_curriculum.training.cache import arrays, filling
from diffusers_curriculum.training.cache.filling import Processes
from diffusers_curriculum.training.cache.latents import cache_latents
from diffusers_curriculum.training.cache.reading import CachedLatents
from diffusers_curriculum.training.data.decoding import decode_image
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import DiskFullError, UsageError
from diffusers_curriculum.training.storage import manifest

SIDE = 16
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 4,
    "norm_num_groups": 4,
}


class Moments(NamedTuple):
    mean: Tensor
    std: Tensor | None


class Pixels:
    """A space without deviation: every fourth pixel; notes what it encoded."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, pixels: Tensor) -> Moments:
        self.batches.append(len(pixels))
        return Moments(pixels[:, :, ::4, ::4].clone(), None)


class Autoencoder:
    """A tiny AutoencoderKL."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.vae = AutoencoderKL(**VAE).eval()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Moments:
        found: Any = self.vae.encode(pixels)
        found = found.latent_dist
        return Moments(found.mean * 0.2, found.std * 0.2)


def make_rows(count: int, size: tuple[int, int] = (24, 20)) -> list[dict]:
    """Undecoded images whose pixels all differ."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(buffer, "PNG")
        rows.append({"image": {"path": None, "bytes": buffer.getvalue()}})
    return rows


ALONE = Processes(progress=False)
CENTER = ImageTransform(SIDE, center_crop=True)
RANDOM = ImageTransform(SIDE, random_flip=True)
IDENTITY = {"vae": {"name": "tiny", "dtype": "float32"}, "data": "abc"}


def cached(folder: Path, rows=None, space=None, transform=CENTER, **options) -> CachedLatents:
    settings = {
        "seed": 3,
        "batch_size": 4,
        "device": "cpu",
        "fingerprint": IDENTITY,
        "processes": ALONE,
    }
    space = Pixels() if space is None else space
    rows = make_rows(6) if rows is None else rows
    return cache_latents(rows, space, transform, folder=folder, **(settings | options))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells when the others were looked at."""
    files = (path for path in folder.iterdir() if path.name != "verified.json")
    return {path.name: path.read_bytes() for path in files}


# -- values ----------------------------------------------------------------------------------------


def test_latents_are_those_of_encoding_on_the_fly(tmp_path):
    rows, space = make_rows(7), Autoencoder()
    latents = cached(tmp_path / "c", rows, space, batch_size=3)
    for start in (0, 3, 6):  # the same batches
        images = [CENTER(decode_image(row["image"]), 0, 0, 0) for row in rows[start : start + 3]]
        expected = space.encode(torch.stack(images))
        for k in range(len(images)):
            mean, std = latents.read(start + k, 0.0, 0.0)
            assert torch.equal(mean, expected.mean[k])
            assert expected.std is not None
            assert std is not None
            assert torch.equal(std, expected.std[k])
            assert mean.dtype == std.dtype == torch.float32
    assert len(latents) == 7
    assert latents.mean.shape == (7, 1, 1, 4, 8, 8)
    other = cached(tmp_path / "other", rows, space, batch_size=7)
    np.testing.assert_allclose(other.mean, latents.mean, atol=1e-6)


def test_the_projects_latent_spaces_fit(tmp_path):
    for vae in (Autoencoder().vae, None):
        space = LatentSpace.of(vae)
        latents = cached(tmp_path / space.kind, make_rows(4), space)
        image = CENTER(decode_image(make_rows(4)[2]["image"]), 0, 0, 0)
        expected = space.encode(image[None])
        mean, std = latents.read(2, 0.0, 0.0)
        torch.testing.assert_close(mean, expected.mean[0], atol=1e-6, rtol=0)
        assert (std is None) == (expected.std is None) == (vae is None)


def test_the_uniforms_choose_crop_and_mirroring(tmp_path):
    rows = make_rows(3)
    latents = cached(tmp_path / "c", rows, transform=RANDOM, crops=3, flip=True)
    assert latents.mean.shape == (3, 3, 2, 3, 4, 4)
    seen = set()
    for row in range(3):
        picture = decode_image(rows[row]["image"]).resize((19, SIDE), Image.Resampling.LANCZOS)
        for crop, u_crop in enumerate((0.0, 0.34, 1 - 2**-53)):
            u_left = host_generator(3, row * 3 + crop, purpose="latent_crop").random(2)[1]
            left = int(u_left * 4)
            seen.add(left)
            part = picture.crop((left, 0, left + SIDE, SIDE))
            for mirrored, u_flip in ((True, 0.0), (True, 0.49), (False, 0.5), (False, 0.99)):
                image = np.asarray(ImageOps.mirror(part) if mirrored else part)
                expected = (image.transpose(2, 0, 1)[:, ::4, ::4] / 255 - 0.5) / 0.5
                mean, std = latents.read(row, u_crop, u_flip)
                np.testing.assert_allclose(mean, expected, atol=1e-6)
                assert std is None
    assert len(seen) > 1


def test_without_mirroring_the_uniform_has_no_effect(tmp_path):
    latents = cached(tmp_path / "c")
    assert torch.equal(latents.read(2, 0.3, 0.1)[0], latents.read(2, 0.9, 0.9)[0])
    assert contents(tmp_path / "c").keys() == {"manifest.json", "mean.npy"}
    for row in (-1, 6):
        with pytest.raises(IndexError, match=f"row {row} is not in the latent cache"):
            latents.read(row, 0.0, 0.0)


def test_half_precision_files(tmp_path):
    full, half = cached(tmp_path / "full"), cached(tmp_path / "half", dtype="float16")
    assert half.mean.dtype == np.float16
    assert half.read(1, 0, 0)[0].dtype == torch.float32
    np.testing.assert_array_equal(half.mean, np.asarray(full.mean).astype(np.float16))


class Reader(Dataset):
    def __init__(self, latents: CachedLatents) -> None:
        self.latents = latents

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, row: int) -> Tensor:
        return self.latents.read(row, 0.0, 0.0)[0]


def test_loader_workers_read_without_a_copy_of_the_files(tmp_path):
    latents = cached(tmp_path / "c", make_rows(40))
    expected = torch.stack([latents.read(row, 0.0, 0.0)[0] for row in range(40)])
    packed = ForkingPickler.dumps(latents)
    assert len(packed) < 2000 < (tmp_path / "c" / "mean.npy").stat().st_size
    unpacked = ForkingPickler.loads(packed)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(unpacked.read(5, 0.0, 0.0)[0], expected[5])
    loader = DataLoader(Reader(latents), 40, num_workers=1, generator=torch.Generator())
    assert torch.equal(next(iter(loader)), expected)


# -- a second run ----------------------------------------------------------------------------------


def test_a_cache_is_used_again_and_nothing_is_encoded(tmp_path):
    first = cached(tmp_path / "c")
    before, space = contents(tmp_path / "c"), Pixels()
    again = cached(tmp_path / "c", space=space, batch_size=2)
    assert space.batches == []
    assert contents(tmp_path / "c") == before
    assert torch.equal(first.read(3, 0, 0)[0], again.read(3, 0, 0)[0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fingerprint": IDENTITY | {"vae": {"name": "big"}}}, "vae.name: 'tiny', now 'big'"),
        ({"fingerprint": IDENTITY | {"data": "abd"}}, "data: 'abc', now 'abd'"),
        ({"fingerprint": {"vae": IDENTITY["vae"]}}, "data: 'abc', now None"),
        ({"transform": ImageTransform(8, center_crop=True)}, "resolution: 16, now 8"),
        ({"transform": ImageTransform(SIDE)}, "center_crop: True, now False"),
        (
            {"transform": ImageTransform(SIDE, "bicubic", center_crop=True)},
            "interpolation: 'lanczos', now 'bicubic'",
        ),
        ({"dtype": "float16"}, "dtype: 'float32', now 'float16'"),
        ({"rows": make_rows(5)}, "rows: 6, now 5"),
        (
            {"transform": ImageTransform(SIDE, center_crop=True, random_flip=True), "flip": True},
            "flip: False, now True",
        ),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, change, told):
    cached(tmp_path / "c")
    before, space = contents(tmp_path / "c"), Pixels()
    with pytest.raises(UsageError, match="Give another folder, or delete it") as caught:
        cached(tmp_path / "c", space=space, **change)
    assert told in str(caught.value)
    assert space.batches == []
    assert contents(tmp_path / "c") == before


def test_the_seed_counts_where_crops_are_drawn(tmp_path):
    cached(tmp_path / "middle", seed=1)
    cached(tmp_path / "middle", seed=2)
    cached(tmp_path / "drawn", transform=RANDOM, flip=True, seed=1)
    with pytest.raises(UsageError, match="seed: 1, now 2"):
        cached(tmp_path / "drawn", transform=RANDOM, flip=True, seed=2)


@pytest.mark.parametrize("name", ["mean.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found(tmp_path, name, damage):
    cached(tmp_path / "c")
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-9] ^= 4
    path.write_bytes(content[:-8] if damage == "cut" else content)
    if damage == "gone":
        path.unlink()
    with pytest.raises(UsageError, match=r"(?i)delete|is no latent cache"):
        cached(tmp_path / "c")
    if damage == "cut":  # the other processes compare the sizes only
        with pytest.raises(UsageError):
            cached(tmp_path / "c", processes=Processes(1, 2, progress=False))


def test_files_are_read_whole_only_where_they_may_have_changed(tmp_path, monkeypatch):
    read: list[str] = []
    hashed = manifest.file_sha256
    monkeypatch.setattr(manifest, "file_sha256", lambda p: (read.append(p.name), hashed(p))[1])
    cached(tmp_path / "c")
    assert read == ["mean.npy"]
    cached(tmp_path / "c")
    assert read == ["mean.npy"]  # nobody touched it
    file = tmp_path / "c" / "mean.npy"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        cached(tmp_path / "c")
    assert read == ["mean.npy"] * 2  # once for all
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UsageError, match="another sha256"):
        cached(tmp_path / "c")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(UsageError, match="exists and is no latent cache"):
        cached(tmp_path)
    assert contents(tmp_path) == {"photo.png": b""}
    (tmp_path / "empty").mkdir()
    assert len(cached(tmp_path / "empty")) == 6


# -- kills -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


class Dying(Pixels):
    """Ends after some batches; the first call is the look at a grey image."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def encode(self, pixels: Tensor) -> Moments:
        if len(self.batches) > self.after:
            raise Killed
        return super().encode(pixels)


def test_a_killed_run_leaves_no_cache_and_the_next_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_COMMIT_EVERY", 2)
    rows = make_rows(30)
    whole = cached(tmp_path / "whole", rows, batch_size=3)
    with pytest.raises(Killed):
        cached(tmp_path / "c", rows, Dying(5), batch_size=3)
    assert not (tmp_path / "c").exists()
    space = Pixels()
    cached(tmp_path / "c", rows, space, batch_size=3)
    assert space.batches == [1, *[3] * 6]  # 4 of 10 batches were safe
    assert contents(tmp_path / "c") == contents(whole.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "whole"]


@pytest.mark.parametrize("change", [{"fingerprint": {"data": "x"}}, {"batch_size": 5}])
def test_what_a_run_of_another_plan_left_is_thrown_away(tmp_path, monkeypatch, change):
    monkeypatch.setattr(arrays, "_COMMIT_EVERY", 1)
    with pytest.raises(Killed):
        cached(tmp_path / "c", make_rows(20), Dying(2), **change)
    space = Pixels()
    cached(tmp_path / "c", make_rows(20), space)
    assert space.batches == [1, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("moment", ["write_manifest", "publish"])
def test_a_kill_at_the_very_end_costs_no_encoding(tmp_path, monkeypatch, moment):
    def kill(*unused: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(filling, moment, kill)
        with pytest.raises(Killed):
            cached(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    space = Pixels()
    cached(tmp_path / "c", space=space)
    assert space.batches == [1]
    assert contents(tmp_path / "c") == contents(cached(tmp_path / "other").folder)


def test_a_disk_that_fills_up_is_told(tmp_path, monkeypatch):
    def full(*unused: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays, "_write_at", full)
    with pytest.raises(DiskFullError, match="No space for"):
        cached(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_space_is_checked_before_encoding(tmp_path, monkeypatch):
    needed = 6 * 3 * 4 * 4 * 4
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(arrays.shutil, "disk_usage", lambda _: free)
    space = Pixels()
    with pytest.raises(UsageError, match=f"needs {needed:,} more bytes, {needed - 1:,} are free"):
        cached(tmp_path / "c", space=space)
    assert space.batches == [1]
    assert list(tmp_path.iterdir()) == []
    free.free = needed
    assert len(cached(tmp_path / "c")) == 6


def test_what_is_on_disk_already_needs_no_space(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_COMMIT_EVERY", 1)
    with pytest.raises(Killed):
        cached(tmp_path / "c", make_rows(8), Dying(1))
    free = SimpleNamespace(free=4 * 3 * 4 * 4 * 4)  # for one batch of the two
    monkeypatch.setattr(arrays.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UsageError, match="needs 1,536 more bytes, 768 are free"):
        cached(tmp_path / "afresh", make_rows(8))
    assert len(cached(tmp_path / "c", make_rows(8))) == 8


# -- several processes -----------------------------------------------------------------------------


def test_two_processes_write_the_files_of_one(tmp_path):
    rows, spaces = make_rows(11), (Pixels(), Pixels())
    options = {"transform": RANDOM, "crops": 2, "flip": True, "batch_size": 3}
    one = cached(tmp_path / "one", rows, **options)
    barrier, results = threading.Barrier(2), {}

    def process(rank: int) -> None:
        results[rank] = cached(
            tmp_path / "two",
            rows,
            spaces[rank],
            processes=Processes(rank, 2, lambda: barrier.wait(20), progress=False),
            **options,
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(space.batches) - 1 for space in spaces] == [23, 21]  # shared out, none twice
    assert contents(tmp_path / "two") == contents(one.folder)
    assert results.keys() == {0, 1}
    assert torch.equal(results[1].read(10, 0.9, 0.0)[0], one.read(10, 0.9, 0.0)[0])


def test_processes_that_do_not_share_the_folder_are_told(tmp_path):
    with pytest.raises(UsageError, match="all processes must see the same folder"):
        cached(
            tmp_path / "c", processes=Processes(0, 2, progress=False)
        )  # the other one's batches never come
    assert not (tmp_path / "c").exists()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": 0}, "crops=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rows": []}, "0 rows"),
        ({"crops": 2}, "would all be the same with --center_crop"),
        ({"flip": True}, "flip=True and random_flip=False disagree"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is unknown"),
        ({"fingerprint": {"rows": 3}}, r"must not have its own \['rows'\]"),
        ({"fingerprint": {"a": float("nan")}}, "is no JSON data"),
        ({"fingerprint": {"a": object()}}, "is no JSON data"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        cached(tmp_path / "c", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_does_not_decode_is_named(tmp_path):
    rows = make_rows(6)
    rows[4]["image"] = {"path": "cats/tom.png", "bytes": b"no image"}
    with pytest.raises(UsageError, match=r"'cats/tom\.png'"):
        cached(tmp_path / "c", rows)


class Overflowing(Pixels):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def encode(self, pixels: Tensor) -> Moments:
        found = super().encode(pixels).mean
        return Moments(torch.full_like(found, self.value), None)


def test_latents_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(UsageError, match="rows 0 to 3 are not finite in float32"):
        cached(tmp_path / "c", space=Overflowing(float("nan")))
    with pytest.raises(UsageError, match="not finite in float16"):
        cached(tmp_path / "c", space=Overflowing(1e6), dtype="float16")
    assert not (tmp_path / "c").exists()
    assert (
        json.loads(
            contents(cached(tmp_path / "c", space=Overflowing(1e6)).folder)["manifest.json"]
        )["facts"]["latents"]["dtype"]
        == "float32"
    )
