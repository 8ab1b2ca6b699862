"""The moving average of any width, made after training from snapshots of averages of a few.

Every average is a weighted mean of the weights of all steps, with a power function for its weights.
The function wanted is approached by a sum of those at hand, and the average by the same sum.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusers_curriculum.training.errors import UsageError

logger = logging.getLogger(__name__)

FORMAT = 1
# One key only: safetensors writes several in an order that differs from call to call.
METADATA = "power_ema"
MAX_SIGMA_REL = 1 / math.sqrt(12)  # gamma = 0: all steps weigh the same
WARN_RESIDUAL, MAX_RESIDUAL = 0.02, 0.1
SNAPSHOT = re.compile(r"step-([0-9]{8,})-sigma_rel-[^/]+\.safetensors")


class Snapshot(NamedTuple):
    """An average on disk: after ``step`` optimizer steps, of width ``sigma_rel``."""

    path: Path
    step: int
    sigma_rel: float
    config: str


class Mixture(NamedTuple):
    """Coefficients (n,) of the snapshots, their sum 1; and ``||p - sum x_i p_i|| / ||p||``."""

    coefficients: NDArray[np.float64]
    residual: float


class Reconstruction(NamedTuple):
    """How an average is put together from snapshots."""

    snapshots: list[Snapshot]
    coefficients: list[float]
    sigma_rel: float
    step: int  # the time of the average, in optimizer steps
    residual: float  # the part of its profile that the snapshots cannot give


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function with standard deviation ``sigma_rel`` times its length.

    The largest root of ``(g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2`` (arXiv 2312.02696, section
    3.1), by Viete's formula.

    Raises:
        UsageError: a width that is not in (0, 1/sqrt(12)], where the exponent is not negative.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise UsageError(
            f"sigma_rel is {sigma_rel}: it must lie above 0 and be at most {MAX_SIGMA_REL:.4f}, "
            "the width of the plain mean of all steps."
        )
    p, q = sigma_rel**-2 + 1 / 3, 2 / 27 + 4 / 3 * sigma_rel**-2
    angle = math.acos(max(-1.0, -1.5 * q / p * math.sqrt(3 / p)))
    return max(0.0, 2 * math.sqrt(p / 3) * math.cos(angle / 3) - 7 / 3)


def inner_products(
    gammas: ArrayLike, ends: ArrayLike, others: ArrayLike, other_ends: ArrayLike
) -> NDArray[np.float64]:
    """All integrals (n, m) of products of two densities ``(g + 1) tau^g / t^(g + 1)`` on [0, t].

    With exponents g, h, ends t, u and ``s = min(t, u)``:
    ``(g + 1) (h + 1) / (g + h + 1) (s / t)^(g + 1) (s / u)^(h + 1) / s``.

    Args:
        gammas, ends: (n,) exponents and ends of the first densities.
        others, other_ends: (m,) those of the second ones.
    """
    g, t = (np.asarray(values, np.float64)[:, None] for values in (gammas, ends))
    h, u = (np.asarray(values, np.float64)[None] for values in (others, other_ends))
    s = np.minimum(t, u)
    tails = np.exp((g + 1) * np.log(s / t) + (h + 1) * np.log(s / u))
    return (g + 1) * (h + 1) / (g + h + 1) * tails / s


def solve_mixture(
    gammas: Sequence[float], ends: Sequence[float], gamma: float, end: float
) -> Mixture:
    """The sum of power functions that comes closest to one, in the mean square over time.

    The problem of arXiv 2312.02696, appendix C, with one condition more: the coefficients sum to 1,
    so that weights that stand still are given exactly. It costs next to nothing in the residual.
    """
    gram = inner_products(gammas, ends, gammas, ends)
    scales = np.sqrt(np.diag(gram))
    norm = math.sqrt(inner_products([gamma], [end], [gamma], [end])[0, 0])
    gram = gram / np.outer(scales, scales)
    towards = inner_products(gammas, ends, [gamma], [end])[:, 0] / scales / norm
    sums = norm / scales  # unit functions: better conditioned
    system = np.block([[gram, sums[:, None]], [sums[None], np.zeros((1, 1))]])
    solved = np.linalg.lstsq(system, np.append(towards, 1.0), rcond=1e-13)[0][:-1]
    square = 1 + solved @ gram @ solved - 2 * solved @ towards
    return Mixture(solved * sums, math.sqrt(max(0.0, square)))


def list_snapshots(folder: str | Path) -> list[Snapshot]:
    """The snapshots in a folder, oldest first.

    Raises:
        UsageError: there are none, one cannot be read, or they are of different models.
    """
    folder = Path(folder)
    paths = [path for path in folder.glob("step-*.safetensors") if SNAPSHOT.fullmatch(path.name)]
    if not paths:
        raise UsageError(
            f"{folder} holds no snapshots of power-function averages: train with --power_ema."
        )
    found = sorted(map(_described, paths), key=lambda one: (one.step, one.sigma_rel))
    for one in found:
        if one.config != found[0].config:
            raise UsageError(
                f"{found[0].path.name} and {one.path.name} are of different models: move those of "
                f"one of the two out of {folder}."
            )
    return found


def plan_reconstruction(
    folder: str | Path,
    sigma_rel: float,
    step: int | None = None,
    max_residual: float = MAX_RESIDUAL,
) -> Reconstruction:
    """Find how snapshots make the average of width ``sigma_rel`` after ``step`` optimizer steps.

    Args:
        step: None is the last snapshot's.
        max_residual: largest part of the profile that may be missing.

    Raises:
        UsageError: no snapshots; a step after the last of them or before step 1; a bad width; more
            is missing than allowed.
    """
    found, gamma = list_snapshots(folder), gamma_of(sigma_rel)
    last, widths = found[-1].step, sorted({one.sigma_rel for one in found})
    end = last if step is None else step
    if not 1 <= end <= last:
        raise UsageError(f"step={step} is outside 1..{last}, the steps that {folder} knows of.")
    gammas = [gamma_of(one.sigma_rel) for one in found]
    mixture = solve_mixture(gammas, [one.step for one in found], gamma, end)
    told = (
        f"sigma_rel={sigma_rel} at step {end}: {len(found)} snapshots of widths {widths} leave "
        f"{mixture.residual:.2g} of its profile out"
    )
    if mixture.residual > max_residual:
        near = min((one.step for one in found), key=lambda saved: abs(saved - end))
        remedy = "a width nearer to theirs" if near == end else f"step {near}, where one was saved"
        raise UsageError(
            f"{told}, more than {max_residual:g}: choose {remedy}, or train with more snapshots."
        )
    if mixture.residual > WARN_RESIDUAL:
        logger.warning("%s.", told)
    return Reconstruction(found, mixture.coefficients.tolist(), sigma_rel, end, mixture.residual)


def reconstructed(plan: Reconstruction) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each averaged parameter, summed in float64; one at a time is in memory.

    Raises:
        UsageError: a snapshot has other parameters than the first.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(one.path)) for one in plan.snapshots]
        for one, file in zip(plan.snapshots, files, strict=True):
            if _shapes(file) != _shapes(files[0]):
                raise UsageError(f"{one.path} has other parameters than {plan.snapshots[0].path}.")
        for name in files[0].keys():  # noqa: SIM118 (it is no dict)
            values = zip(plan.coefficients, (file.get_tensor(name) for file in files), strict=True)
            total = sum(coefficient * value.double() for coefficient, value in values)
            yield name, torch.as_tensor(total).float()


def _shapes(file: Any) -> dict[str, list[int]]:
    return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read ({error}): move it away.") from error


def _described(path: Path) -> Snapshot:
    with _opened(path) as file:
        metadata = file.metadata() or {}
    try:
        told = json.loads(metadata[METADATA])
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']}, this version reads {FORMAT}")
        return Snapshot(path, int(told["step"]), float(told["sigma_rel"]), str(told["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no snapshot of an average ({error!r}): move it.") from error
