"""What generated pictures are looked at with: a classifier of the task's own data."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.evidence.cells import VERSION, digest
from benchmarks.evidence.data import Pictures, pictures
from diffusers_curriculum.metrics.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
)

FEATURES, WIDTH, STEPS, BATCH = 64, 256, 800, 256
FEW = 1000  # of each kind, for what compares each with each


class Captions(nn.Linear):
    """Scores of captions (N, C) from features (N, 64): the sums of those of their words (C, W)."""

    def __init__(self, words: Tensor) -> None:
        super().__init__(FEATURES, words.shape[1])
        self.words = words

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.words.T


class Judge:
    """A classifier trained on all of a data set, and the features of its real pictures."""

    def __init__(self, data: Pictures, state: dict[str, Tensor] | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features = nn.Sequential(
                nn.Linear(data.rows.shape[1], WIDTH),
                nn.SiLU(),
                nn.Linear(WIDTH, FEATURES),
                nn.SiLU(),
            )
            words = data.words
            self.head = nn.Linear(FEATURES, data.classes) if words is None else Captions(words)
        self.network = nn.Sequential(self.features, self.head)
        if state is None:
            self._train(data)
        else:
            self.network.load_state_dict(state)

    def _train(self, data: Pictures) -> None:
        optimizer = torch.optim.AdamW(self.network.parameters(), 1e-3, weight_decay=0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            rows = torch.randint(len(data.rows), (BATCH,), generator=generator)
            noisy = data.rows[rows] + 0.3 * torch.randn(
                BATCH, data.rows.shape[1], generator=generator
            )
            loss = F.cross_entropy(self.network(noisy), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def look(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 64) and the class (N,) of pictures (N, pixels)."""
        seen = self.features(rows)
        return seen, self.head(seen).argmax(1)


@cache
def judge_of(name: str, cache_dir: Path) -> Judge:
    """The judge of a data set; trained once, and kept in ``cache_dir``."""
    data = pictures(name)
    scale = [float(x) for x in (data.rows.sum(), data.rows.abs().sum(), len(data.rows))]
    told = [name, scale, FEATURES, WIDTH, STEPS, BATCH, VERSION]
    file = cache_dir / f"judge-{name}-{digest(told)}.safetensors"
    if file.is_file():
        return Judge(data, load_file(file))
    judge = Judge(data)
    keep(file, judge.network.state_dict())
    return judge


def keep(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors so that the file is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}.part")
    save_file(tensors, aside)
    aside.replace(file)


def distances(judge: Judge, real: Pictures, rows: Tensor, labels: Tensor) -> dict[str, float]:
    """Of generated pictures (N, pixels) that were asked for as classes (N,): Frechet and kernel
    distance, precision, recall, and the share whose class the judge agrees with: of captions, that
    for which its own is the nearest of all.

    Not finite where the pictures are not."""
    names = ("frechet", "kernel", "precision", "recall", "agreement")
    features, found = judge.look(rows)
    if not bool(features.isfinite().all()):
        return dict.fromkeys(names, float("nan"))
    truth, few = judge.look(real.rows)[0], spread(len(real.rows), FEW)
    some = features[spread(len(features), FEW)]
    precision, recall = precision_recall(truth[few], some)
    agreement = float((found == labels).double().mean())
    values = (
        frechet_distance(truth, features),
        kernel_distance(truth[few][: len(some)], some[: len(few)]),
        precision,
        recall,
        agreement,
    )
    return dict(zip(names, values, strict=True))


def spread(total: int, count: int) -> Tensor:
    """At most ``count`` indices below ``total``, always the same ones."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]
