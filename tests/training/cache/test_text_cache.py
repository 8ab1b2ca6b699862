"""What a network is told of captions, on disk: the very numbers, refusals, kills, and processes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_curriculum.training.cache import captions as text_cache
from diffusers_curriculum.training.cache.captions import CachedCaptions, cache_captions
from diffusers_curriculum.training.cache.filling import Processes
from diffusers_curriculum.training.errors import DiskFullError, UsageError
from tests.training.cache.test_latent_cache import Killed, cached, contents

CAPTIONS = [f"picture {number}" for number in range(11)]
ENCODER = {"encoder": "tiny", "dtype": "torch.float32"}


class Encoder:
    """Tells of a caption by its letters, in every form of families; notes what it encoded."""

    def __init__(self, after: int | None = None) -> None:
        self.seen, self.after = list[str](), after

    def __call__(self, caption: str) -> dict[str, Any]:
        if len(self.seen) == self.after:
            raise Killed
        self.seen.append(caption)
        letters = torch.tensor([[float(ord(letter)) for letter in caption or " "]])
        return {
            "states": letters.bfloat16(),
            "mask": letters > 100,
            "places": letters.long().expand(1, -1),
            "listed": [letters[0, 1:]],
        }


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cache, "SHARD", 3)


def kept(folder: Path, encode: Any = None, captions: Any = CAPTIONS, **more: Any) -> CachedCaptions:
    settings = {"fingerprint": ENCODER, "processes": Processes(progress=False)} | more
    encode = Encoder() if encode is None else encode
    return cache_captions(captions, lambda some: [*map(encode, some)], folder=folder, **settings)


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return [*map(torch.Tensor.tolist, found)] == [*map(torch.Tensor.tolist, expected)]
    return found.dtype == expected.dtype and torch.equal(found, expected)


def test_what_is_told_of_a_caption_is_what_was_encoded(tmp_path: Path) -> None:
    several = [*CAPTIONS, "", "picture 3"]  # of other lengths, and one of them twice
    encode = Encoder()
    captions = kept(tmp_path / "c", encode, several)
    assert sorted(encode.seen) == sorted({*several})
    assert captions.keys() == {*several}
    for caption in several:
        expected, found = Encoder()(caption), captions[caption]
        assert found.keys() == expected.keys()
        assert all(same(found[name], expected[name]) for name in expected)
    assert "picture 99" not in captions
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert {"00000.safetensors", "00003.safetensors", "manifest.json"} < names


def test_it_is_used_again_in_any_order_and_nothing_is_encoded(tmp_path: Path) -> None:
    kept(tmp_path / "c")
    before, encode = contents(tmp_path / "c"), Encoder()
    again = kept(tmp_path / "c", encode, [*reversed(CAPTIONS)])
    assert encode.seen == []
    assert contents(tmp_path / "c") == before
    assert same(again["picture 4"]["states"], Encoder()("picture 4")["states"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fingerprint": ENCODER | {"encoder": "big"}}, "encoder: 'tiny', now 'big'"),
        ({"fingerprint": ENCODER | {"dtype": "torch.float16"}}, "now 'torch.float16'"),
        ({"captions": CAPTIONS[1:]}, "count: 11, now 10"),
        ({"captions": [*CAPTIONS[1:], "another"]}, "captions: "),
    ],
)
def test_one_of_something_else_is_refused(tmp_path: Path, change: Any, told: str) -> None:
    kept(tmp_path / "c")
    encode = Encoder()
    with pytest.raises(UsageError, match=r"text cache .* Give another folder, or delete") as caught:
        kept(tmp_path / "c", encode, **change)
    assert told in str(caught.value)
    assert encode.seen == []


def test_latents_are_no_captions(tmp_path: Path) -> None:
    cached(tmp_path / "latents")
    with pytest.raises(UsageError, match="is a latent cache and no text cache"):
        kept(tmp_path / "latents")
    kept(tmp_path / "captions")
    with pytest.raises(UsageError, match="is a text cache and no latent cache"):
        cached(tmp_path / "captions")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    kept(tmp_path / "c")
    file = tmp_path / "c" / "00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content[:-8] if damage == "cut" else content)
    if damage == "gone":
        file.unlink()
    with pytest.raises(UsageError, match=r"00001\.safetensors .* Delete it, and it is made again"):
        kept(tmp_path / "c")


def test_a_killed_run_leaves_no_cache_and_the_next_goes_on(tmp_path: Path) -> None:
    whole = kept(tmp_path / "whole")
    with pytest.raises(Killed):
        kept(tmp_path / "c", Encoder(after=8))
    assert not (tmp_path / "c").exists()
    (left,) = tmp_path.glob(".tmp-c/files")
    (left / ".tmp-00002.safetensors-1").write_bytes(b"half")
    encode = Encoder()
    kept(tmp_path / "c", encode)
    assert encode.seen == sorted(CAPTIONS)[6:]  # two of four files were whole
    assert contents(tmp_path / "c") == contents(whole.folder)


def test_what_a_run_of_other_captions_left_is_thrown_away(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        kept(tmp_path / "c", Encoder(after=8), captions=[f"other {n}" for n in range(11)])
    encode = Encoder()
    kept(tmp_path / "c", encode)
    assert len(encode.seen) == 11


def test_a_disk_that_fills_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*unused: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_cache, "write_atomically", full)
    with pytest.raises(DiskFullError, match="No space for"):
        kept(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_two_processes_write_the_files_of_one(tmp_path: Path) -> None:
    one, barrier, encoders = kept(tmp_path / "one"), threading.Barrier(2), (Encoder(), Encoder())

    def process(rank: int) -> None:
        processes = Processes(rank, 2, lambda: barrier.wait(20), progress=False)
        kept(tmp_path / "two", encoders[rank], processes=processes)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(encode.seen) for encode in encoders] == [6, 5]  # shared out, none twice
    assert contents(tmp_path / "two") == contents(one.folder)
