"""Measuring how difficult noise levels are, for a data set and for the networks of a pipeline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_curriculum.analysis.convergence import Curves, Trial, convergence, starts_of
from diffusers_curriculum.analysis.difficulty import Difficulty, analyse_data, std_of
from diffusers_curriculum.analysis.gradients import gradient_statistics
from diffusers_curriculum.analysis.probes import Grid, Probe, make_grid, probe
from diffusers_curriculum.analysis.relative_entropy import principal_variances
from diffusers_curriculum.analysis.score_rate import score_rate
from diffusers_curriculum.analysis.suggestion import Profile, half_known, half_known_of_data
from diffusers_curriculum.training.parts.analysed import Analysed

_RATE_SAMPLES = 16  # each takes two backward passes at each level


def measure(own: Any, analysed: Analysed) -> Difficulty:
    """Everything that SOURCE and the flags allow, with a progress bar."""
    networks = analysed.saved_networks(own.most_checkpoints, own.raw_weights)
    levels = analysed.objective.levels
    with tqdm(desc="measuring", file=sys.stderr, unit=" levels", disable=None) as bar:
        data = analyse_data(analysed.samples, levels, own.bins, seed=own.seed, each=bar.update)
        if not networks:
            return Difficulty(analysed.scheduler, data, clusters=own.clusters)
        passes = len(networks) + 1 + (own.gradient_samples > 0)
        bar.total = 2 + len(data.grid.indices) * passes + _training_steps(own, data.grid)
        found = _of_networks(own, analysed, data.grid, networks, bar.update)
    return Difficulty(analysed.scheduler, data, clusters=own.clusters, **found)


def half_known_by(own: Any, analysed: Analysed) -> Profile:
    """How nearly the pipeline's network half knows its images at each noise level, or mean and
    covariance where there is none, with a progress bar.

    Raises:
        ValueError: it is nowhere so: the samples are the same, or the network knows nothing.
    """
    std_of(analysed.samples)
    levels, variances = analysed.objective.levels, principal_variances(analysed.samples)
    networks, found = analysed.saved_networks(0), half_known_of_data(levels, variances)
    if networks:
        grid = make_grid(levels, own.bins)
        total = len(grid.indices)
        with tqdm(
            desc="calibrating", file=sys.stderr, unit=" levels", disable=None, total=total
        ) as bar:
            probes, _ = _probes(own, analysed, grid, networks, bar.update)
        found = half_known(probes["pipeline"], float(variances.mean()))
    if found.empty:
        raise ValueError(
            f"at no noise level are these {len(analysed.samples)} images half known: the error of "
            "x0 is the same at all of them. Give images that differ, and a trained network."
        )
    return found


def _of_networks(
    own: Any, analysed: Analysed, grid: Grid, networks: dict[str, Path], each: Any
) -> dict[str, Any]:
    """What is only to be had of networks, the last one above all."""
    probes, network = _probes(own, analysed, grid, networks, each)
    samples, objective = analysed.samples[: own.samples], analysed.objective
    denoiser, gradients = analysed.denoiser(network), None
    settings: dict[str, Any] = {"seed": own.seed, "each_level": each}
    network.requires_grad_(False)
    few, size = samples[:_RATE_SAMPLES], own.batch_size
    rate = score_rate(denoiser, objective, few, grid, batch_size=size, **settings)
    network.requires_grad_(True)
    few, clusters = samples[: own.gradient_samples], own.clusters
    if len(few) >= 4:
        gradients = gradient_statistics(
            denoiser, network.parameters(), objective, few, grid, clusters=clusters, **settings
        )
    curves = _converge(own, analysed, grid, each) if own.convergence_steps else {}
    return {"probes": probes, "network_rate": rate, "gradients": gradients, "convergence": curves}


def _probes(
    own: Any, analysed: Analysed, grid: Grid, networks: dict[str, Path], each: Any
) -> tuple[dict[str, Probe], Any]:
    """Of all networks, and the last of these; a checkpoint that is the pipeline is left out."""
    probes: dict[str, Probe] = {}
    network, before = None, None
    for name, folder in networks.items():
        network = analysed.network(folder)
        found = probe(
            analysed.denoiser(network),
            analysed.objective,
            analysed.samples[: own.samples],
            grid,
            seed=own.seed,
            batch_size=own.batch_size,
            data=analysed.samples,
            each_level=each,
        )
        if before is not None and torch.equal(found.x0_errors, probes[before].x0_errors):
            del probes[before]
        probes[name], before = found, name
    return probes, network


def _training_steps(own: Any, grid: Grid) -> int:
    return own.convergence_steps * (min(own.clusters, len(grid.indices)) + 1)


def _converge(own: Any, analysed: Analysed, grid: Grid, each: Any) -> dict[str, Curves]:
    """New networks, trained on samples that are not probed."""
    trial = Trial(
        analysed.untrained,
        analysed.objective,
        analysed.samples,
        own.samples,
        batch_size=own.batch_size,
        learning_rate=own.convergence_rate,
        seed=own.seed,
    )
    every = max(1, own.convergence_steps // 20)
    starts = starts_of(grid, own.clusters)
    return convergence(trial, grid, starts, own.convergence_steps, every, each_step=each)
