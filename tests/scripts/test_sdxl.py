"""Stable Diffusion XL: the official step bit for bit, the crop that is told, and what is left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffusers_curriculum.objective import Objective
from tests.scripts.small_runs import Bench, adapted, make_sdxl_bench, status, write_images
from tests.scripts.test_parity import ADAPTER, UNET_TARGETS, official_adapter
from tests.text_adapters import needs_text_adapters

CACHED = ("--cache_latents", "--latent_crops", 2, "--random_flip")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny pipeline, and images that are wider than high."""
    torch.set_num_threads(1)
    return make_sdxl_bench(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def wide(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which crops are cut out at different places."""
    folder = write_images(tmp_path_factory.mktemp("wide") / "images", 8)
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        with Image.open(path) as image:
            image.resize((24 + 4 * number, 12)).save(path)
    return folder


# -- the step --------------------------------------------------------------------------------------


@dataclass
class Witness:
    """What a step was given, and what it computed."""

    batch: dict[str, Tensor]
    latents: Tensor
    noise: Tensor
    posterior: Tensor
    timesteps: Tensor
    told: dict[str, Tensor]
    weights: dict[str, dict[str, Tensor]]  # by part
    config: dict[str, Any]
    loss: Tensor
    gradients: dict[str, Tensor]


def first_step(bench: Bench, folder: Path, *more: object) -> Witness:
    """Run one micro-batch of the script, and note everything about it."""
    noted: dict[str, Any] = {}
    forward, add_noise = UNet2DConditionModel.forward, Objective.add_noise
    script: Any = bench.module
    gaussian, step = script.gaussian, script.training_step

    def drawing(shape: Any, **told: Any) -> Tensor:
        drawn = gaussian(shape, **told)
        noted[told["purpose"]] = drawn.clone()
        return drawn

    def added(self: Objective, sample: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        noted.update(latents=sample.clone(), noise=noise.clone())
        return add_noise(self, sample, noise, indices)

    def predicted(self: Any, sample: Tensor, timestep: Tensor, text: Tensor, **more: Any) -> Any:
        told = {"encoder_hidden_states": text.clone(), **more["added_cond_kwargs"]}
        noted.update(timesteps=timestep.clone(), told=told)
        return forward(self, sample, timestep, text, **more)

    def stepped(run: Any, number: int, slots: Any, batch: dict[str, Tensor]) -> Any:
        parts = {"unet": run.models.network, **run.models.encoders}
        noted.update(weights={name: cloned(part) for name, part in parts.items()}, batch=batch)
        result = step(run, number, slots, batch)
        config = dict(run.models.network.config)
        noted.update(loss=result[2][0], gradients=gradients_of(parts), config=config)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "gaussian", drawing)
        patch.setattr(Objective, "add_noise", added)
        patch.setattr(UNet2DConditionModel, "forward", predicted)
        patch.setattr(script, "training_step", stepped)
        bench.train(folder, *more, "--max_train_steps", 1, batch=4)
    return Witness(**{name: noted[name] for name in Witness.__annotations__})


def cloned(part: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in part.state_dict().items()}


def gradients_of(parts: dict[str, Any]) -> dict[str, Tensor | None]:
    """Of all that is trained, by part and name."""
    return {
        f"{part}.{name}": None if weight.grad is None else weight.grad.clone()
        for part, network in parts.items()
        for name, weight in network.named_parameters()
        if weight.requires_grad
    }


def official_networks(folder: Path, witness: Witness) -> dict[str, Any]:
    """UNet and text encoders of diffusers' script, with its adapters where there are some here."""
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    found: dict[str, Any] = {n: k.from_pretrained(folder, subfolder=n) for n, k in kinds.items()}
    for encoder in found.values():
        encoder.requires_grad_(False)
    found["unet"] = UNet2DConditionModel.from_config(witness.config)
    for part, network in found.items():
        if any("lora_A" in name for name in witness.weights[part]):
            targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
            official_adapter(network, UNET_TARGETS if part == "unet" else targets)
        names = network.state_dict().keys()  # where only that script has an adapter, others
        weights = {
            name if name in names else name.replace("_proj.", "_proj.base_layer."): weight
            for name, weight in witness.weights[part].items()
        }
        assert network.load_state_dict(weights, strict=False).unexpected_keys == []
    return found


def official_conditions(networks: dict[str, Any], witness: Witness) -> dict[str, Tensor]:
    """What diffusers' script tells the network of the same captions."""
    embeds, pooled = [], torch.empty(0)
    for suffix in ("", "_2"):
        encoder, tokens = networks[f"text_encoder{suffix}"], witness.batch[f"input_ids{suffix}"]
        found = encoder(tokens, output_hidden_states=True, return_dict=False)
        pooled = found[0]
        embeds.append(found[-1][-2])
    return {"encoder_hidden_states": torch.concat(embeds, dim=-1), "text_embeds": pooled}


def official_latents(folder: Path, witness: Witness) -> Tensor:
    """The latents of diffusers' script of the same images, for the same draw."""
    vae: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    vae.requires_grad_(False)  # which changes the last bits
    with torch.no_grad():
        posterior = vae.encode(witness.batch["pixel_values"]).latent_dist
    return (posterior.mean + posterior.std * witness.posterior) * vae.config.scaling_factor


def official_step(
    folder: Path, witness: Witness, kind: str, gamma: float | None
) -> tuple[Tensor, Any]:
    """Loss and gradients by the formulas of diffusers' script, through diffusers' own functions;
    of a network that predicts x0 without that script's subtraction of the noise."""
    scheduler: Any = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.register_to_config(prediction_type=kind)
    x0, noise, t = witness.latents, witness.noise, witness.timesteps
    networks = official_networks(folder, witness)
    told = official_conditions(networks, witness) | {"time_ids": witness.told["time_ids"]}
    noisy = scheduler.add_noise(x0, noise, t)
    velocity = scheduler.get_velocity(x0, noise, t)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[kind]
    text = told.pop("encoder_hidden_states")
    output = networks["unet"](noisy, t, text, added_cond_kwargs=told, return_dict=False)[0]
    if gamma is None:
        loss = F.mse_loss(output.float(), target.float(), reduction="mean")
    else:
        snr = compute_snr(scheduler, t)
        weight = torch.stack([snr, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
        if kind != "sample":
            weight = weight / (snr if kind == "epsilon" else snr + 1)
        each = F.mse_loss(output.float(), target.float(), reduction="none")
        loss = (each.mean(dim=list(range(1, len(each.shape)))) * weight).mean()
    loss.backward()
    return loss.detach(), gradients_of(networks)


ALL = ("--train_text_encoder", *ADAPTER)
CASES = [("epsilon", None, ()), ("epsilon", 5.0, ()), ("v_prediction", 5.0, ())]
CASES += [("sample", None, ()), ("sample", 5.0, ())]
CASES += [("epsilon", 5.0, ADAPTER)]
CASES += [
    pytest.param(*case, ALL, marks=needs_text_adapters)
    for case in (("epsilon", None), ("v_prediction", 5.0))
]
# the last layer of the first text encoder, as transformers 4 and 5 name it
UNHEARD = ("text_encoder.text_model.encoder.layers.1.", "text_encoder.encoder.layers.1.")


@pytest.mark.parametrize(("kind", "gamma", "adapter"), CASES)
def test_the_step_equals_diffusers(
    bench: Bench, tmp_path: Path, kind: str, gamma: float | None, adapter: tuple[object, ...]
) -> None:
    more = ("--prediction_type", kind, *(() if gamma is None else ("--snr_gamma", gamma)))
    script = adapted(bench, "lora_sdxl") if adapter else bench
    witness = first_step(script, tmp_path, *more, *adapter)
    networks = official_networks(bench.pipeline, witness)
    for name, value in official_conditions(networks, witness).items():
        assert torch.equal(witness.told[name], value)
    assert torch.equal(witness.latents, official_latents(bench.pipeline, witness))
    loss, gradients = official_step(bench.pipeline, witness, kind, gamma)
    assert torch.equal(witness.loss, loss)
    # diffusers' script has an adapter too where no gradient arrives
    assert [k for k, g in gradients.items() if g is None] == [
        k for k in gradients if k.startswith(UNHEARD)
    ]
    found = {k: g for k, g in gradients.items() if g is not None}
    assert witness.gradients.keys() == found.keys()
    assert [k for k, g in found.items() if not torch.equal(witness.gradients[k], g)] == []
    assert all(float(g.abs().sum()) > 0 for k, g in found.items() if "lora_" in k)
    assert sum(float(g.abs().sum()) for g in found.values()) > 0
    parts = {"unet", "text_encoder", "text_encoder_2"} if adapter == ALL else {"unet"}
    assert {name.partition(".")[0] for name in found} == parts
    card = (tmp_path / "README.md").read_text()
    assert ("* Text encoders: trained by adapters" in card) == (adapter == ALL)


@needs_text_adapters
def test_adapters_alone_change_and_are_float32(bench: Bench, tmp_path: Path) -> None:
    more = (*ALL, "--max_train_steps", 2, "--mixed_precision", "bf16", "--use_ema")
    adapter = adapted(bench, "lora_sdxl").train(tmp_path, *more).last.weights
    assert {weight.dtype for weight in adapter.parameters()} == {torch.float32}
    mine = {id(weight) for weight in adapter.parameters()}
    assert adapter.networks.keys() == {"unet", "text_encoder", "text_encoder_2"}
    for part, network in adapter.networks.items():
        base = [weight for weight in network.parameters() if id(weight) not in mine]
        assert {weight.dtype for weight in base} == {torch.bfloat16}
        assert not any(weight.requires_grad for weight in base)
        saved = load_file(next((bench.pipeline / part).glob("*.safetensors")))
        held = {plain(name): weight for name, weight in network.state_dict().items()}
        assert all(torch.equal(held[plain(n)], w.bfloat16()) for n, w in saved.items())


def plain(name: str) -> str:
    """The name of a weight without an adapter beside it, in any transformers."""
    return name.replace(".base_layer", "").removeprefix("text_model.")


@needs_text_adapters
def test_recomputing_gives_the_same_gradients(bench: Bench, tmp_path: Path) -> None:
    script, more = adapted(bench, "lora_sdxl"), (*ALL, "--max_train_steps", 2)
    more += ("--pretrained_vae_model_name_or_path", bench.pipeline / "vae")
    plain = script.train(tmp_path / "a", *more)
    again = script.train(tmp_path / "b", *more, "--gradient_checkpointing")
    assert again.steps == plain.steps
    encoder = again.last.models.encoders["text_encoder"]
    assert encoder.is_gradient_checkpointing
    assert "* Autoencoder: vae" in (tmp_path / "b" / "README.md").read_text()


def test_the_comparison_can_fail(bench: Bench, tmp_path: Path) -> None:
    witness = first_step(bench, tmp_path, "--snr_gamma", 5)
    right = official_step(bench.pipeline, witness, "epsilon", 5.0)
    assert torch.equal(right[0], witness.loss)
    witness.told["time_ids"] = witness.told["time_ids"] + 1
    loss, gradients = official_step(bench.pipeline, witness, "epsilon", 5.0)
    assert not torch.equal(loss, witness.loss)
    assert any(not torch.equal(g, witness.gradients[k]) for k, g in gradients.items())


# -- the crop that is told -------------------------------------------------------------------------


def test_each_sample_is_told_its_own_crop(bench: Bench, wide: Path, tmp_path: Path) -> None:
    witness = first_step(bench, tmp_path, "--train_data_dir", wide, "--random_flip")
    ids = witness.told["time_ids"]
    assert ids.shape == (4, 6)
    assert set(ids[:, 0].tolist()) == {12.0}
    assert ids[:, 1].min() >= 24
    assert len({tuple(row) for row in ids[:, 2:4].tolist()}) > 1
    assert ids[:, 4:].tolist() == [[8.0, 8.0]] * 4


def test_cached_latents_are_those_of_the_crops_that_are_told(
    bench: Bench, wide: Path, tmp_path: Path
) -> None:
    more = ("--train_data_dir", wide, "--image_interpolation_mode", "nearest", *CACHED)
    witness = first_step(bench, tmp_path, *more)
    assert {"mean", "std", "time_ids"} < witness.batch.keys()
    vae: Any = AutoencoderKL.from_pretrained(bench.pipeline, subfolder="vae")
    found = 0
    for mean, ids in zip(witness.batch["mean"], witness.told["time_ids"], strict=True):
        found += any(torch.allclose(mean, one, atol=1e-5) for one in encoded(vae, wide, ids))
    assert found == 4


def encoded(vae: Any, folder: Path, ids: Tensor) -> list[Tensor]:
    """Of every image, as it is and mirrored, the latents of the crop that is told."""
    _, width, top, left = (int(value) for value in ids[:4])
    variants = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            if image.width != width:
                continue
            small = image.resize((int(8 * width / 12), 8), Image.Resampling.NEAREST)
        for one in (small, small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            pixels = torch.from_numpy(np.array(one.crop((left, top, left + 8, top + 8))))
            pixels = (pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5
            with torch.no_grad():
                variants.append(vae.encode(pixels[None]).latent_dist.mean[0])
    return variants


# -- what is left ----------------------------------------------------------------------------------


def test_a_pipeline_of_another_family_is_refused(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_text_to_image_curriculum as other

    argv = bench.argv(tmp_path)
    assert status(argv, other.__name__) == 2
    assert "its unet's addition_embed_type is 'text_time'" in capsys.readouterr().err
