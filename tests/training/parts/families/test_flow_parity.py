"""Given the same images, captions, noise and levels, a step of each family of flow matching has the
loss and the gradients of diffusers' scripts, bit for bit: train_dreambooth_lora_sd3, _flux,
_flux2_klein, _qwen_image, _z_image and _krea2, whose formulas stand here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from diffusers_curriculum import Slots
from diffusers_curriculum.randomness import gaussian
from diffusers_curriculum.training.parts.captions import CaptionEncoder
from diffusers_curriculum.training.tasks.flow import FlowRun, FlowTransformer
from examples.text_to_image.train_text_to_image_flow_curriculum import training_step
from tests.training.parts.families.flow_benches import FLOWS, RESOLUTION, pipeline_of

SEED, BATCH = 3, 3
CAPTIONS = ["a red bird", "two small birds on a wall", "a red bird"]
SLOTS = Slots(0, BATCH, BATCH)


def make_run(name: str, *more: object) -> FlowRun:
    """What the step works with, as a job makes it, on the CPU."""
    task, words = FlowTransformer(), map(str, more)
    base = (
        "--pretrained_model_name_or_path",
        str(pipeline_of(name)),
        "--dataset_name",
        "some/data",
    )
    args = task.parse([*base, "--resolution", str(RESOLUTION), *words], machine=False)
    task.choose(args, SEED)
    cpu = torch.device("cpu")
    models = task.family.load_components(args, task.tokenizers, cpu, torch.float32)
    backward = SimpleNamespace(device=cpu, backward=lambda loss: loss.backward())
    unused = dict.fromkeys(("averages", "optimizer", "guard", "lr_scheduler"))
    return FlowRun(
        **unused,  # pyright: ignore[reportArgumentType]
        args=args,
        accelerator=backward,
        seed=SEED,
        network=models.network,
        levels=task.levels,
        family=task.family,
        models=models,
        captions=CaptionEncoder(task.family, models, cpu, task.encode_text),
        guidance=3.5 if models.network.config.get("guidance_embeds") else None,
    )


class Official:
    """What the scripts compute between a batch and its loss, family by family."""

    def __init__(self, run: FlowRun, pixels: Tensor) -> None:
        self.run, self.net = run, run.models.network
        self.vae, self.pixels = run.models.vae, pixels
        self.pipe = run.family.text_pipeline(run.models)

    def posterior(self, pixels: Tensor, mode: bool = False) -> Tensor:
        found = self.vae.encode(pixels).latent_dist
        if mode:
            return found.mode()
        return found.mean + found.std * self.draw(found.mean.shape[1:], "posterior")

    def draw(self, shape: Any, purpose: str) -> Tensor:
        return gaussian(shape, seed=SEED, step=0, slots=SLOTS, purpose=purpose)

    def scaled(self, mode: bool = False) -> Tensor:
        config = self.vae.config
        return (self.posterior(self.pixels, mode) - config.shift_factor) * config.scaling_factor

    def sd3(self) -> tuple[Tensor, Callable[..., Tensor]]:
        told = self.pipe.encode_prompt(
            CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=77
        )

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.net(
                hidden_states=noisy,
                timestep=timesteps,
                encoder_hidden_states=told[0],
                pooled_projections=told[2],
                return_dict=False,
            )[0]

        return self.scaled(), predict

    def flux(self) -> tuple[Tensor, Callable[..., Tensor]]:
        pipe = diffusers.FluxPipeline
        embeds, pooled, text_ids = self.pipe.encode_prompt(
            CAPTIONS, CAPTIONS, max_sequence_length=512
        )

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            b, c, h, w = noisy.shape
            output = self.net(
                hidden_states=pipe._pack_latents(noisy, b, c, h, w),
                timestep=timesteps / 1000,
                guidance=torch.tensor([3.5]).expand(b),
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=pipe._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
                return_dict=False,
            )[0]
            return pipe._unpack_latents(output, h * 2, w * 2, 2)

        return self.scaled(), predict

    def flux2(self) -> tuple[Tensor, Callable[..., Tensor]]:
        pipe: Any = diffusers.Flux2KleinPipeline
        bn = self.vae.bn
        embeds, text_ids = self.pipe.encode_prompt(CAPTIONS, max_sequence_length=512)
        latents = pipe._patchify_latents(self.posterior(self.pixels, mode=True))
        mean = bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            ids = pipe._prepare_latent_ids(noisy)
            packed = pipe._pack_latents(noisy)
            output = self.net(
                hidden_states=packed,
                timestep=timesteps / 1000,
                guidance=None,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )[0][:, : packed.size(1) :]
            return pipe._unpack_latents_with_ids(output, ids)

        return (latents - mean) / std, predict

    def qwen_image(self) -> tuple[Tensor, Callable[..., Tensor]]:
        pipe, config = diffusers.QwenImagePipeline, self.vae.config
        embeds, mask = self.pipe.encode_prompt(prompt=CAPTIONS, max_sequence_length=512)
        mean = torch.tensor(config.latents_mean).view(1, config.z_dim, 1, 1, 1)
        factor = 1.0 / torch.tensor(config.latents_std).view(1, config.z_dim, 1, 1, 1)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            b, c, _, h, w = noisy.shape
            output = self.net(
                hidden_states=pipe._pack_latents(noisy.permute(0, 2, 1, 3, 4), b, c, h, w),
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                timestep=timesteps / 1000,
                img_shapes=[(1, h // 2, w // 2)] * b,
                return_dict=False,
            )[0]
            return pipe._unpack_latents(output, h * 2, w * 2, 2)

        return (self.posterior(self.pixels.unsqueeze(2)) - mean) * factor, predict

    def krea2(self) -> tuple[Tensor, Callable[..., Tensor]]:
        pipe, config = diffusers.Krea2Pipeline, self.vae.config
        cpu = torch.device("cpu")
        embeds, mask = self.pipe.encode_prompt(prompt=CAPTIONS, max_sequence_length=512)
        mean = torch.tensor(config.latents_mean).view(1, config.z_dim, 1, 1, 1)
        factor = 1.0 / torch.tensor(config.latents_std).view(1, config.z_dim, 1, 1, 1)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            b, c, _, h, w = noisy.shape
            tokens = noisy.permute(0, 2, 1, 3, 4).reshape(b, c, h // 2, 2, w // 2, 2)
            tokens = tokens.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
            output = self.net(
                hidden_states=tokens,
                encoder_hidden_states=embeds,
                timestep=timesteps / 1000,
                position_ids=pipe.prepare_position_ids(embeds.shape[1], h // 2, w // 2, cpu),
                encoder_attention_mask=mask,
                return_dict=False,
            )[0]
            output = output.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
            return output.reshape(b, c, 1, h, w)

        return (self.posterior(self.pixels.unsqueeze(2)) - mean) * factor, predict

    def z_image(self) -> tuple[Tensor, Callable[..., Tensor]]:
        embeds, _ = self.pipe.encode_prompt(prompt=[*CAPTIONS], max_sequence_length=512)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            listed = list(noisy.unsqueeze(2).unbind(dim=0))
            output = self.net(listed, (1000 - timesteps) / 1000, embeds, return_dict=False)[0]
            return -torch.stack(output, dim=0).squeeze(2)

        return self.scaled(mode=True), predict

    def loss(self, name: str, scheme: str, precondition: bool) -> Tensor:
        """From the very table of levels that diffusers' scheduler has."""
        with torch.no_grad():
            x0, predict = getattr(self, name)()
        drawn = self.run.sampler.sample(SLOTS, step=0, device="cpu")
        scheduler = self.run.levels.scheduler
        index = len(scheduler.timesteps) - 1 - drawn.indices  # theirs begin at noise
        timesteps, sigmas = scheduler.timesteps[index], scheduler.sigmas[index]
        sigmas = sigmas.view(-1, *[1] * (x0.ndim - 1))
        noise = self.draw(x0.shape[1:], "noise")
        noisy = (1.0 - sigmas) * x0 + sigmas * noise
        output, target = predict(noisy, timesteps), noise - x0
        if precondition:
            output, target = output * (-sigmas) + noisy, x0
        weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
        squares = weighting.float() * (output.float() - target.float()) ** 2
        return torch.mean(squares.reshape(target.shape[0], -1), 1).mean()


def gradients(network: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


CASES = [*((name, "none", 0) for name in FLOWS), ("sd3", "sigma_sqrt", 1), ("flux", "cosmap", 0)]
CASES += [("sd3", "logit_normal", 1), ("z_image", "mode", 0)]


@pytest.mark.parametrize(("name", "scheme", "precondition"), CASES)
def test_a_step_equals_that_of_diffusers(name: str, scheme: str, precondition: int) -> None:
    more = ("--weighting_scheme", scheme, "--precondition_outputs", precondition)
    run = make_run(name, *more)
    pixels = gaussian((3, RESOLUTION, RESOLUTION), seed=1, step=0, slots=SLOTS, purpose="noise")
    outcome = training_step(run, 0, SLOTS, {"pixel_values": pixels, "caption": CAPTIONS})
    found = gradients(run.network)
    run.network.zero_grad()

    expected = Official(run, pixels).loss(name, scheme, bool(precondition))
    expected.backward()
    assert torch.equal(outcome.loss[0], expected.detach())
    wanted = gradients(run.network)
    assert found.keys() == wanted.keys()
    assert len(found) > 10
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    assert sum(float(g.abs().sum()) for g in found.values()) > 0
