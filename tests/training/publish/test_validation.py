"""Validation pictures: same seed same picture, and training left exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_curriculum.models.tiny import tokenizer_of_pairs
from diffusers_curriculum.training.levels.sampling import with_prediction_type
from diffusers_curriculum.training.parts.components import Components
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.publish.pictures import (
    decoding_precisely,
    evaluation_mode,
    image_grid,
)
from diffusers_curriculum.training.publish.text_to_image import validation_images

PROMPTS = ("a b", "b a a")


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    tokens = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    tokenizer = tokenizer_of_pairs("CLIP", tokens, [], model_max_length=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        blocks: Any = {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        vae = AutoencoderKL(norm_num_groups=4, sample_size=16, **blocks)
        return {
            "vae": vae,
            "text_encoder": CLIPTextModel(text),
            "tokenizer": tokenizer,
            "unet": unet,
            "scheduler": DDPMScheduler(clip_sample=False, steps_offset=1),
        }


def pipeline_of(components: dict[str, Any], prediction_type: str | None = None) -> Any:
    names = ("text_encoder", "tokenizer")
    encoders, tokenizers = ({name: components[name]} for name in names)
    models = Components(components["unet"], components["vae"], encoders, tokenizers)
    scheduler = with_prediction_type(components["scheduler"], prediction_type)
    return families()["sd"].pipeline_of(models, models.network, scheduler)


def sample(components: dict[str, Any], prompts: Any = PROMPTS, **options: Any) -> list[np.ndarray]:
    prediction_type = options.pop("prediction_type", None)
    settings = {"seed": 3, "device": "cpu", "steps": 2} | options
    images = validation_images(
        lambda: pipeline_of(components, prediction_type), prompts, **settings
    )
    assert all(image.size == (16, 16) for image in images)
    return [np.asarray(image) for image in images]


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def test_same_seed_same_pictures_other_seed_others(components: dict[str, Any]) -> None:
    first = sample(components)
    assert len(first) == len(PROMPTS)
    assert same(first, sample(components))
    assert not same(first, sample(components, seed=4))


def test_a_picture_does_not_depend_on_the_other_prompts(components: dict[str, Any]) -> None:
    prompts = ("a b", "b a a", "b", "a b")
    together = sample(components, prompts)
    alone = [image for prompt in prompts for image in sample(components, [prompt])]
    assert same(together, alone)
    assert same(together[::-1], sample(components, prompts[::-1]))
    distinct = {image.tobytes() for image in together}
    assert len(distinct) == 3  # the last prompt is the first


def test_global_generators_are_untouched(components: dict[str, Any]) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore
    sample(components)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # type: ignore


def test_twenty_steps_unless_told_otherwise(components: dict[str, Any]) -> None:
    calls = []
    handle = components["unet"].register_forward_hook(lambda *_: calls.append(1))
    try:
        validation_images(lambda: pipeline_of(components), ["a"], seed=0, device="cpu")
    finally:
        handle.remove()
    assert len(calls) == 20


def test_modes_and_weights_come_back(components: dict[str, Any]) -> None:
    unet = components["unet"].train()
    components["vae"].eval()
    weights = [p.detach().clone() for p in unet.parameters()]
    seen = []
    handle = unet.register_forward_hook(lambda module, *_: seen.append(module.training))
    try:
        sample(components)
    finally:
        handle.remove()
    assert seen
    assert not any(seen)
    assert unet.training
    assert not components["vae"].training
    assert all(map(torch.equal, weights, unet.parameters()))


def test_modes_come_back_after_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    seen = []

    def fail() -> None:
        seen.extend(module.training for module in model.modules())
        raise KeyError

    with pytest.raises(KeyError), evaluation_mode(model):
        fail()
    assert seen == [False, False, False]
    assert [module.training for module in model.modules()] == [True, True, False]


def test_autocast_surrounds_the_sampling(components: dict[str, Any]) -> None:
    dtypes, entered = set(), []

    @contextmanager
    def autocast() -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16):
            entered.append(1)
            yield

    layer = components["unet"].conv_in
    handle = layer.register_forward_hook(lambda _m, _i, out: dtypes.add(out.dtype))
    try:
        sample(components, autocast=autocast)
    finally:
        handle.remove()
    assert dtypes == {torch.bfloat16}
    assert len(entered) == 1


def test_an_autoencoder_may_decode_in_its_own_precision(components: dict[str, Any]) -> None:
    vae, seen = components["vae"], []

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    handle = vae.decoder.conv_in.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    try:
        build = lambda: decoding_precisely(pipeline_of(components))  # noqa: E731
        for _ in range(2):  # the same models, pipeline after pipeline
            validation_images(build, ["a"], seed=0, device="cpu", steps=1, autocast=autocast)
    finally:
        handle.remove()
        del vae.decode
    assert seen == [torch.float32] * 2
    sample(components, ["a"], autocast=autocast, steps=1)


def test_memory_is_freed_even_after_an_error(
    components: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = []
    monkeypatch.setattr("diffusers.training_utils.free_memory", lambda: freed.append(1))
    sample(components)
    assert len(freed) == 1
    with pytest.raises(ValueError, match="has to be of type"):
        sample(components, [3])
    assert len(freed) == 2


def test_the_prediction_type_of_the_run_is_used(components: dict[str, Any]) -> None:
    unet = components["unet"]
    assert not same(sample(components), sample(components, prediction_type="v_prediction"))
    pipeline = pipeline_of(components, "v_prediction")
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    assert components["scheduler"].config["prediction_type"] == "epsilon"
    assert pipeline.unet is unet


def test_prediction_types_that_a_scheduler_cannot_take() -> None:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert with_prediction_type(flow, "flow").config["shift"] == 3.0
    with pytest.raises(ValueError, match=r"FlowMatchEuler.*'epsilon'; use a scheduler"):
        with_prediction_type(flow, "epsilon")
    euler = EulerDiscreteScheduler(beta_start=0.001, prediction_type="v_prediction")
    kept = with_prediction_type(euler, None)
    assert kept is not euler
    assert kept.config == euler.config


def coloured(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 2), (value, 0, 0)) for value in values]


def test_grid_has_a_row_per_prompt() -> None:
    grid = np.asarray(image_grid(coloured(1, 2, 3, 4, 5, 6), PROMPTS))
    assert grid.shape == (4, 12, 3)
    assert grid[::2, ::4, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="3 pictures cannot fill 2 rows"):
        image_grid(coloured(1, 2, 3), PROMPTS)
