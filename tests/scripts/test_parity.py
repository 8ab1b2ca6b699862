"""Given the same latents, noise and timesteps, a step computes what diffusers' script computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor

from diffusers_curriculum import Objective
from diffusers_curriculum.training.loop import job
from tests.scripts.small_runs import Bench, adapted, train


@dataclass
class Witness:
    """What went into the first micro-batch of a run, and what came out."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    embeddings: Tensor
    weights: dict[str, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]
    config: dict[str, Any]


def first_step(bench: Bench, folder: Path, *more: object) -> Witness:
    """Run one micro-batch of the script, and note everything about it."""
    noted: dict[str, Any] = {}
    forward, add_noise = UNet2DConditionModel.forward, Objective.add_noise
    step = bench.module.training_step

    def added(self: Objective, sample: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        noted.update(latents=sample.clone(), noise=noise.clone())
        return add_noise(self, sample, noise, indices)

    def predicted(self: Any, sample: Tensor, timestep: Tensor, text: Tensor, **kwargs: Any) -> Any:
        noted.update(timesteps=timestep.clone(), embeddings=text.clone())
        return forward(self, sample, timestep, text, **kwargs)

    def stepped(run: Any, *args: Any) -> Any:
        unet = run.models.network
        noted.update(weights={k: v.clone() for k, v in unet.state_dict().items()})
        result = step(run, *args)
        gradients = {k: p.grad.clone() for k, p in unet.named_parameters() if p.requires_grad}
        noted.update(loss=result[2][0], gradients=gradients, config=dict(unet.config))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "add_noise", added)
        patch.setattr(UNet2DConditionModel, "forward", predicted)
        patch.setattr(bench.module, "training_step", stepped)
        bench.train(folder, *more, "--max_train_steps", 1, batch=4)
    return Witness(**noted)


def official(witness: Witness, scheduler: Any, gamma: float | None) -> tuple[Tensor, Any]:
    """Loss and gradients by the formulas of diffusers' script, through diffusers' own functions."""
    kind = scheduler.config.prediction_type
    x0, noise, t = witness.latents, witness.noise, witness.timesteps
    unet: Any = UNet2DConditionModel.from_config(witness.config)
    if any("lora_A" in name for name in witness.weights):
        official_adapter(unet, UNET_TARGETS)
    unet.load_state_dict(witness.weights)
    noisy = scheduler.add_noise(x0, noise, t)
    target = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, t)
    output = unet(noisy, t, witness.embeddings, return_dict=False)[0]
    if gamma is None:
        loss = F.mse_loss(output.float(), target.float(), reduction="mean")
    else:
        snr = compute_snr(scheduler, t)
        weight = torch.minimum(snr, gamma * torch.ones_like(snr))
        weight = weight / (snr if kind == "epsilon" else snr + 1)
        each = F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        loss = (each * weight).mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in unet.named_parameters() if p.requires_grad}


UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def official_adapter(network: Any, targets: list[str]) -> None:
    """Freeze a network, and put diffusers' adapter into it, but for its alpha."""
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]

    network.requires_grad_(False)
    network.add_adapter(
        LoraConfig(r=4, lora_alpha=6, init_lora_weights="gaussian", target_modules=targets)
    )


# Updates that are not zero, as the gradient of half of an adapter would be then.
ADAPTER = ("--rank", 4, "--lora_alpha", 6, "--init_lora_weights", "orthogonal")


def scheduler_of(bench: Bench, kind: str) -> Any:
    scheduler: Any = DDPMScheduler.from_pretrained(bench.pipeline, subfolder="scheduler")
    scheduler.register_to_config(prediction_type=kind)
    return scheduler


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0, 1.0])
@pytest.mark.parametrize("trained", ["all", "adapter"])
def test_script_step_equals_diffusers(
    bench: Bench, tmp_path: Path, kind: str, gamma: float | None, trained: str
) -> None:
    bench, more = (adapted(bench), ADAPTER) if trained == "adapter" else (bench, ())
    more = more if gamma is None else (*more, "--snr_gamma", gamma)
    witness = first_step(bench, tmp_path, "--prediction_type", kind, *more)
    loss, gradients = official(witness, scheduler_of(bench, kind), gamma)
    assert torch.equal(witness.loss, loss)
    assert witness.gradients.keys() == gradients.keys()
    different = [k for k, g in gradients.items() if not torch.equal(witness.gradients[k], g)]
    assert different == []
    assert all(float(g.abs().sum()) > 0 for g in gradients.values())


def test_the_comparison_can_fail(bench: Bench, tmp_path: Path) -> None:
    witness = first_step(bench, tmp_path, "--snr_gamma", 5)
    right = official(witness, scheduler_of(bench, "epsilon"), 5.0)
    assert torch.equal(right[0], witness.loss)
    for kind, gamma in (("v_prediction", 5.0), ("epsilon", None), ("epsilon", 0.5)):
        loss, gradients = official(witness, scheduler_of(bench, kind), gamma)
        assert not torch.equal(loss, witness.loss)
        assert any(not torch.equal(g, witness.gradients[k]) for k, g in gradients.items())


# -- clipping --------------------------------------------------------------------------------------


def applied_update(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: object
) -> tuple[float, float]:
    """Length of what plain gradient descent at rate 1 changed, and the norm told for it."""
    descent: Callable[..., Any] = lambda args, parameters, *rest: torch.optim.SGD(  # noqa: E731
        parameters, lr=1.0
    )
    monkeypatch.setattr(job, "build_optimizer", descent)
    record = train(bench.argv(folder, *more, "--max_train_steps", 1))
    after = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    before = UNet2DConditionModel.from_pretrained(bench.pipeline / "unet").state_dict()
    moved = torch.cat([(after[k] - before[k]).flatten().double() for k in before])
    norm = record.steps[0].norm
    assert norm is not None
    return float(moved.norm()), norm


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_the_applied_update_is_clipped(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, limit: float
) -> None:
    more = ("--max_grad_norm", limit, "--gradient_accumulation_steps", accumulation)
    length, norm = applied_update(bench, tmp_path, monkeypatch, *more)
    assert 0.01 < norm < 1e6
    assert length == pytest.approx(min(norm, limit), rel=1e-2)


def test_accumulated_gradients_are_those_of_the_whole_batch(bench: Bench, tmp_path: Path) -> None:
    whole = train(bench.argv(tmp_path / "a", "--max_train_steps", 1, batch=4))
    more = ("--max_train_steps", 1, "--gradient_accumulation_steps", 4)
    parts = train(bench.argv(tmp_path / "b", *more, batch=1))
    assert parts.steps[0].norm == pytest.approx(whole.steps[0].norm, rel=1e-5)
    assert float.fromhex(parts.losses[0]) == pytest.approx(float.fromhex(whole.losses[0]), rel=1e-5)
