#!/usr/bin/env python
"""Train a causal language model on the codes of images, the second stage of ViT-VQGAN
(arXiv 2110.04627), with a law over the positions of the codes.

The autoencoder is one that train_vit_vqgan.py has left, or a VQModel. Everything that is random is
a function of the seed, the step and the sample's slot in the global batch, so that a stopped run
goes on bit for bit; `--help` lists the flags.

    accelerate launch examples/autoregressive/train_image_tokens_curriculum.py \
        --train_data_dir folders_by_class --class_conditional --resolution 256 \
        --pretrained_vae_model_name_or_path vit-vqgan --cache_latents \
        --model_type gpt2 --model_args n_layer=24 n_embd=1024 n_head=16 --use_ema
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffusers_curriculum import Slots
from diffusers_curriculum.training.loop.job import Job, run_script
from diffusers_curriculum.training.loop.run import LevelLosses
from diffusers_curriculum.training.tasks.image_tokens import ImageTokenRun, ImageTokens


def encode(run: ImageTokenRun, batch: dict[str, Tensor], draw: Any) -> tuple[Tensor, Any]:
    """Codes (B, N) of images, or those of the cache, and their classes if these are told."""
    device = run.accelerator.device
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    classes = batch["label"] if run.args.class_conditional else None
    return run.codes(batch), classes


def predict(run: ImageTokenRun, codes: Tensor, classes: Tensor | None) -> Tensor:
    """Logits (B, n, K) of each of n codes, given those before it."""
    return run.network(codes[:, :-1], classes, return_dict=False)[0]


def training_step(
    run: ImageTokenRun, step: int, slots: Slots, batch: dict[str, Tensor]
) -> LevelLosses:
    """One micro-batch, from images or their cached codes to gradients."""
    codes, classes = encode(run, batch, None)

    # What each position counts; those after the last that counts are not computed
    weights = run.position_weights(step)
    codes = codes[:, : len(weights)]

    # Predict; dropout draws from the global generator
    run.seed_model(step, slots)
    logits = predict(run, codes, classes)

    # Loss and gradients
    loss, losses = run.loss(logits, codes, weights)
    run.accelerator.backward(loss)
    return run.outcome(losses, loss)


def main(argv: Sequence[str] | None = None) -> None:
    """Train from a command line (default: the program's own), from loading to the upload.

    Raises:
        UsageError: bad arguments, data or checkpoint; before any model is loaded.
        NonFiniteError: a loss or gradient was not finite.
    """
    Job(ImageTokens(), argv).train(training_step, encode, predict)


if __name__ == "__main__":
    run_script(main)
