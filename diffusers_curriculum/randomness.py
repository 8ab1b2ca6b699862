"""Random numbers as pure functions of (seed, step, global sample slot, purpose).

Nothing here has a state: a resumed run needs no saved generator, ranks differ by construction, and
one process or two see the same draws.  The global generators of torch, numpy and Python are
neither read nor changed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_curriculum.catalogue import Catalogue

DRAWS: Catalogue[Callable[[np.random.Generator, int, int, int], np.ndarray]] = Catalogue("draw")
# u is kept inside (0, 1): an inverse cdf may be infinite at the ends. 1 - 2^-53 is the largest
# float64 below 1.
_TINY = 2.0**-53
_WORD = np.dtype("<u8")
_KEY = struct.Struct("<2Q")
_NONE = (0, 0, 0, 0)
_IDLE: list[np.random.Generator] = []
# the bits of each byte in reverse order
_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1])


@dataclass(frozen=True)
class Slots:
    """Which samples of an optimizer step's global batch one micro-batch on one rank holds.

    Attributes:
        start: slot of the first sample.
        count: number of samples.
        total: size of the global batch (batch x accumulation x ranks).
    """

    start: int
    count: int
    total: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.count < 1 or self.start + self.count > self.total:
            raise ValueError(
                f"slots {self.start}..{self.start + self.count - 1} do not fit a global batch of "
                f"{self.total}: count must be at least 1 and the slots lie in 0..total-1."
            )

    @classmethod
    def of(
        cls,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_step: int = 0,
        accumulation: int = 1,
    ) -> Slots:
        """The slots of micro-step ``micro_step`` on ``rank``: micro-steps first, then ranks.

        Raises:
            ValueError: a rank or micro-step outside its range.
        """
        if not (0 <= rank < world_size and 0 <= micro_step < accumulation):
            raise ValueError(
                f"rank={rank} must lie in 0..{world_size - 1} and micro_step={micro_step} in "
                f"0..{accumulation - 1}."
            )
        start = (micro_step * world_size + rank) * batch_size
        return cls(start, batch_size, batch_size * world_size * accumulation)

    @classmethod
    def here(cls, batch_size: int) -> Slots:
        """The slots of this rank of torch.distributed, if all ranks have equal batches."""
        rank, world_size = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return cls.of(batch_size, rank=rank, world_size=world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.start + self.count))


def key(seed: int, *counters: int, purpose: str) -> int:
    """A 128-bit key, a stable hash (blake2b) of its arguments."""
    return int.from_bytes(_digest(seed, counters, purpose), "little")


def host_generator(seed: int, *counters: int, purpose: str) -> np.random.Generator:
    """A fresh counter-based (Philox) numpy generator, keyed by :func:`key` of these arguments."""
    words: Any = _Key(_digest(seed, counters, purpose))  # numpy's hints know SeedSequence only
    return np.random.Generator(np.random.Philox(words))


class _Key(np.random.bit_generator.ISeedSequence):
    """A Philox key as what numpy asks seeds of: ``Philox(key=...)`` does the same, but reads
    entropy from the system first and throws it away, which takes four times as long."""

    def __init__(self, digest: bytes) -> None:
        self.words = np.frombuffer(digest, dtype=_WORD)  # two, the low one first

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self.words


def _lent(seed: int, *counters: int, purpose: str) -> np.random.Generator:
    """What :func:`host_generator` gives, but lent: an idle one at the beginning of the stream, in a
    fifth of the time of making one. Whoever is done with it puts it into ``_IDLE``."""
    try:
        rng = _IDLE.pop()
    except IndexError:
        rng = np.random.Generator(np.random.Philox(0))
    rng.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": _NONE, "key": _KEY.unpack(_digest(seed, counters, purpose))},
        "buffer": _NONE,
        "buffer_pos": 4,  # nothing is left in it
        "has_uint32": 0,
        "uinteger": 0,
    }
    return rng


def _digest(seed: int, counters: Sequence[int], purpose: str) -> bytes:
    text = repr((purpose, int(seed), *map(int, counters)))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def gaussian(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    slots: Slots,
    purpose: str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise, one independent stream per sample slot.

    Values are the same whatever the batch size, accumulation or number of ranks. They differ
    between kinds of device: numpy's Philox on the CPU (torch's generator there would use 32 bits
    of the key), the device's own generator elsewhere.

    Args:
        shape: shape of one sample.
        slots: the samples wanted.
        purpose: a name that separates streams ("noise", "posterior", ...).

    Returns:
        (slots.count, *shape) float32 on ``device``.
    """
    device = torch.device(device)
    if device.type == "cpu":
        rows = np.empty((slots.count, *shape), dtype=np.float32)
        for row, slot in enumerate(slots):
            stream = _lent(seed, step, slot, purpose=purpose)
            rows[row] = stream.standard_normal(shape, dtype=np.float32)
            _IDLE.append(stream)
        return torch.from_numpy(rows)
    noise = torch.empty((slots.count, *shape), device=device)
    generator = torch.Generator(device)
    for row, slot in zip(noise, slots, strict=True):
        generator.manual_seed(key(seed, step, slot, purpose=purpose) >> 65)
        row.normal_(generator=generator)
    return noise


def uniforms(draw: str, *, seed: int, step: int, slots: Slots, purpose: str = "timestep") -> Tensor:
    """Numbers in (0, 1) for the slots of one optimizer step, to be put through an inverse cdf.

    Every mode gives each slot the uniform marginal law; they differ in how the numbers of one
    global batch (all ranks, all micro-steps) share out (0, 1):

    - "iid": independently.
    - "stratified": one in each of ``total`` equal strata, jittered in its stratum; the variance of
      a mean is never above iid.
    - "antithetic": in pairs u, 1 - u.
    - "systematic": one shift for an equally spaced grid (arXiv 2107.00630).
    - "sobol": consecutive points of a base-2 low-discrepancy sequence that runs on over the steps.

    Strata are dealt to slots in random order, so that a slot says nothing about its noise level.

    Returns:
        (slots.count,) float64 on the CPU.

    Raises:
        ValueError: unknown ``draw``.
    """
    make = DRAWS.look_up(draw)
    rng, stream = _lent(seed, step, purpose=purpose), 0
    if draw == "sobol":
        stream = _stream(seed, purpose)
    u = make(rng, slots.total, step, stream)[slots.start : slots.start + slots.count]
    _IDLE.append(rng)
    return torch.from_numpy(np.minimum(np.maximum(u, _TINY), 1 - _TINY))


@lru_cache(maxsize=16)
def _stream(seed: int, purpose: str) -> int:
    """The key of a sequence that runs on over the steps."""
    return key(seed, purpose=f"{purpose} sequence")


def batch_uniforms(
    draw: str,
    batch: int | Slots,
    *,
    seed: int,
    step: int,
    generator: torch.Generator | None = None,
    purpose: str = "timestep",
) -> Tensor:
    """:func:`uniforms` for a batch of this rank, or for the exact slots that it fills; where a
    ``generator`` is given, keyed by its next number instead of by (seed, step)."""
    if generator is not None:
        drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
        seed, step = int(drawn), 0
    slots = batch if isinstance(batch, Slots) else Slots.here(batch)
    return uniforms(draw, seed=seed, step=step, slots=slots, purpose=purpose)


@DRAWS.register("iid", formula="u_i independent")
def _iid(rng: np.random.Generator, total: int, step: int, stream: int) -> np.ndarray:
    return rng.random(total)


@DRAWS.register("stratified", formula="u_i = (pi(i) + r_i) / N")
def _stratified(rng: np.random.Generator, total: int, step: int, stream: int) -> np.ndarray:
    return (rng.permutation(total) + rng.random(total)) / total


@DRAWS.register("antithetic", formula="u, 1 - u in pairs")
def _antithetic(rng: np.random.Generator, total: int, step: int, stream: int) -> np.ndarray:
    half = rng.random((total + 1) // 2)
    return rng.permutation(np.concatenate([half, 1 - half])[:total])


@DRAWS.register("systematic", formula="u_i = (pi(i) / N + r) mod 1", source="arXiv 2107.00630")
def _systematic(rng: np.random.Generator, total: int, step: int, stream: int) -> np.ndarray:
    return (rng.permutation(total) / total + rng.random()) % 1.0


@DRAWS.register(
    "sobol",
    formula="base-2 radical inverse, digitally shifted",
    source="Sobol 1967, first dimension",
)
def _sobol(rng: np.random.Generator, total: int, step: int, stream: int) -> np.ndarray:
    shift = stream & ((1 << 53) - 1)  # one for all steps
    points = _radical_inverse(np.arange(step * total, (step + 1) * total, dtype=np.uint64))
    # a digital shift keeps the sequence's evenness and makes each point uniform
    return rng.permutation(((points ^ np.uint64(shift)) + 0.5) * 2.0**-53)


def _radical_inverse(index: np.ndarray) -> np.ndarray:
    """The low 53 bits of ``index`` in reverse order: Sobol's first dimension, as integers."""
    return _REVERSED.take(index.view(np.uint8)).view(np.uint64).byteswap() >> np.uint64(11)
