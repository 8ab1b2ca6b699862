"""Our pipelines against diffusers' own, what is saved and loaded again, and which one fits.

Loaded weights lie elsewhere in memory, which alone moves convolutions by 1e-7.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from diffusers_curriculum.pipelines import (
    ClassConditionalPipeline,
    UnconditionalPipeline,
    fitting_pipeline,
)
from tests.pipelines.parts_fixtures import (
    AUTOENCODERS,
    SCHEDULERS,
    generator,
    tiny_dit,
    tiny_kl,
    tiny_unet,
)

NAMES = {0: "cat, tabby", 1: "dog", 2: "crane", 3: "crane"}
LATENTS = {"pixels": (3, 16), "AutoencoderKL": (4, 8), "VQModel": (4, 8), "ViTVQModel": (8, 4)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(pipeline: Any, *args: Any, seed: int = 0, steps: int = 4, **settings: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        *args, generator=generator(seed), num_inference_steps=steps, output_type="pt", **settings
    ).images
    # what older pipelines of diffusers give for "pt" is "np"
    return images if isinstance(images, Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)


def conditional(network: Any = None, vae: Any = None, **settings: Any) -> ClassConditionalPipeline:
    settings = {"scheduler": DDIMScheduler(), "id2label": NAMES} | settings
    network = tiny_dit() if network is None else network
    return ClassConditionalPipeline(transformer=network, vae=vae, **settings)


# -- the same as diffusers' own --------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_the_images_are_those_of_dit_pipeline(kind: Any, scale: float, learned: bool) -> None:
    network, vae = tiny_dit(out_channels=8 if learned else 4), tiny_kl()
    theirs = DiTPipeline(network, vae, kind(), id2label=NAMES)
    expected = run(theirs, class_labels=[1, 3, 0], guidance_scale=scale)
    ours = run(conditional(network, vae, scheduler=kind()), [1, 3, 0], guidance_scale=scale)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    assert (expected - expected[:1]).abs().max() > 0.01  # images differ


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_the_images_are_those_of_ddpm_pipeline(kind: Any) -> None:
    network = tiny_unet()
    expected = run(DDPMPipeline(network, kind()), batch_size=3)
    ours = run(UnconditionalPipeline(kind(), unet=network), batch_size=3)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_guidance_works_with_ten_classes_in_both() -> None:
    """DiTPipeline takes class 1000 as the null class: 1,000 rows, of which ten are used."""
    names = {n: str(n) for n in range(10)}
    network, vae = tiny_dit(), tiny_kl()
    pipeline = fitting_pipeline(network, vae, DDIMScheduler(), names)
    assert type(pipeline) is DiTPipeline
    guided = run(pipeline, class_labels=[7], guidance_scale=4.0)
    ours = run(conditional(network, vae, id2label=names), ["7"], guidance_scale=4.0)
    torch.testing.assert_close(ours, guided, atol=1e-6, rtol=0)
    plain = run(pipeline, class_labels=[7], guidance_scale=1.0)
    assert (guided - plain).abs().max() > 1e-3


def test_the_networks_own_null_class_guides_where_dit_pipeline_fails() -> None:
    names, vae = {n: str(n) for n in range(10)}, tiny_kl()
    network = tiny_dit(classes=10)
    theirs: Any = DDIMScheduler()
    with pytest.raises(IndexError):
        run(DiTPipeline(network, vae, theirs), class_labels=[7], guidance_scale=4.0)
    pipeline = fitting_pipeline(network, vae, DDIMScheduler(), names)
    assert type(pipeline) is ClassConditionalPipeline
    table = [block.norm1.emb.class_embedder.embedding_table for block in network.transformer_blocks]
    before = run(pipeline, [7], guidance_scale=4.0)
    with torch.no_grad():
        for one in table:
            one.weight[10] += 1.0
    assert (run(pipeline, [7], guidance_scale=4.0) - before).abs().max() > 1e-3


def test_images_without_guidance_do_not_depend_on_the_null_class() -> None:
    network = tiny_dit(classes=10)
    pipeline = conditional(network, tiny_kl())
    before = run(pipeline, [2], guidance_scale=1.0)
    with torch.no_grad():
        for block in network.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight[10] = torch.nan
    torch.testing.assert_close(run(pipeline, [2], guidance_scale=1.0), before, rtol=0, atol=0)
    outside = run(pipeline, [2], guidance_scale=9.0, guidance_interval=(1.0, 1.0))
    torch.testing.assert_close(outside, before, rtol=0, atol=0)


# -- saved and loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SCHEDULERS)
@pytest.mark.parametrize("latents", AUTOENCODERS)
def test_a_saved_pipeline_gives_the_same_image(
    latents: str, family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    channels, size = LATENTS[latents]
    network = tiny_dit(10, channels, size)
    vae = AUTOENCODERS[latents]()
    pipeline = conditional(network, vae, scheduler=SCHEDULERS[family]())
    expected = run(pipeline, ["dog", 0], guidance_scale=2.0, seed=5)
    assert expected.shape == (2, 3, 16, 16)
    pipeline.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert "Expected types" not in capfd.readouterr().err  # diffusers' complaint about parts
    assert type(loaded.vae) is type(vae)
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert loaded.labels == pipeline.labels
    found = run(loaded, ["dog", 0], guidance_scale=2.0, seed=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    again = tmp_path / "again"
    loaded.save_pretrained(again)  # names whose numbers JSON made strings
    twice = ClassConditionalPipeline.from_pretrained(again)
    assert twice.get_label_ids(["tabby", "dog"]) == [0, 1]


@pytest.mark.parametrize("latents", AUTOENCODERS)
@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_a_saved_unconditional_pipeline_gives_the_same_image(
    part: str, latents: str, tmp_path: Path
) -> None:
    channels, size = LATENTS[latents]
    network = tiny_unet(channels, size) if part == "unet" else tiny_dit(0, channels, size)
    pipeline = UnconditionalPipeline(
        DDPMScheduler(), vae=AUTOENCODERS[latents](), **{part: network}
    )
    expected = run(pipeline, batch_size=2)
    pipeline.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = UnconditionalPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded, batch_size=2), expected, rtol=0, atol=1e-5)
    assert (run(loaded, batch_size=2, seed=1) - expected).abs().max() > 1e-3


def test_a_unet_with_classes_is_saved_and_guided(tmp_path: Path) -> None:
    network = tiny_unet(num_class_embeds=5)
    pipeline = fitting_pipeline(network, None, DDIMScheduler(), NAMES)
    assert pipeline.unet is network
    expected = run(pipeline, ["cat", "dog"], guidance_scale=3.0)
    pipeline.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    found = run(loaded, ["cat", "dog"], guidance_scale=3.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_names_in_a_dit_pipeline_survive(tmp_path: Path) -> None:
    fitting_pipeline(
        tiny_dit(), tiny_kl(), DDIMScheduler(), {0: "cat, tabby", 1: "dog"}
    ).save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert loaded.labels == {"cat": 0, "dog": 1, "tabby": 0}


# -- which one fits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "vae", "scheduler", "expected"),
    [
        ({}, {}, DDIMScheduler(), DiTPipeline),
        ({"out_channels": 8}, {}, DDPMScheduler(), DiTPipeline),
        ({}, {}, DPMSolverMultistepScheduler(), DiTPipeline),
        ({}, {}, EulerDiscreteScheduler(), ClassConditionalPipeline),
        ({}, {}, FlowMatchEulerDiscreteScheduler(), ClassConditionalPipeline),
        ({}, {}, DDPMScheduler(variance_type="learned_range"), ClassConditionalPipeline),
        ({}, {"shift_factor": 0.1}, DDIMScheduler(), ClassConditionalPipeline),
        ({"classes": 1001}, {}, DDIMScheduler(), ClassConditionalPipeline),
        ({"out_channels": None}, {}, DDIMScheduler(), ClassConditionalPipeline),
    ],
)
def test_dit_pipeline_is_taken_where_it_fits(
    network: Any, vae: Any, scheduler: Any, expected: type
) -> None:
    found = fitting_pipeline(tiny_dit(**network), tiny_kl(**vae), scheduler, NAMES)
    assert type(found) is expected
    if expected is DiTPipeline:  # and it runs
        assert run(found, class_labels=[1], guidance_scale=2.0).isfinite().all()


def test_dit_pipeline_is_not_taken_in_other_latents() -> None:
    for name in ("VQModel", "pixels"):
        channels, size = LATENTS[name]
        dit = tiny_dit(1000, channels, size)
        found = fitting_pipeline(dit, AUTOENCODERS[name](), DDIMScheduler(), NAMES)
        assert type(found) is ClassConditionalPipeline


@pytest.mark.parametrize(
    ("network", "scheduler", "expected"),
    [
        (tiny_unet(), DDPMScheduler(), DDPMPipeline),
        (tiny_unet(out_channels=6), DDPMScheduler(variance_type="learned_range"), DDPMPipeline),
        (tiny_unet(out_channels=6), DDPMScheduler(), UnconditionalPipeline),
        (tiny_unet(), FlowMatchEulerDiscreteScheduler(), UnconditionalPipeline),
        (tiny_unet(num_class_embeds=4), DDPMScheduler(), UnconditionalPipeline),
        (tiny_dit(1000, 3), DDPMScheduler(), UnconditionalPipeline),
    ],
)
def test_ddpm_pipeline_is_taken_where_it_fits(network: Any, scheduler: Any, expected: type) -> None:
    found = fitting_pipeline(network, None, scheduler)
    assert type(found) is expected
    assert run(found, batch_size=1).isfinite().all()
    with_vae = fitting_pipeline(network, tiny_kl(latent_channels=3), scheduler)
    assert type(with_vae) is UnconditionalPipeline


# -- labels and generators -------------------------------------------------------------------------


def test_labels_are_those_of_dit_pipeline() -> None:
    scheduler: Any = DDIMScheduler()
    theirs = DiTPipeline(tiny_dit(), tiny_kl(), scheduler, id2label=NAMES)
    pipeline = conditional()
    assert pipeline.labels == theirs.labels
    assert list(pipeline.labels) == list(theirs.labels)
    assert pipeline.get_label_ids(["tabby", "dog"]) == theirs.get_label_ids(["tabby", "dog"])


def test_names_may_be_given_alone_whole_or_as_synonyms() -> None:
    pipeline = conditional()
    assert pipeline.get_label_ids("dog") == [1]
    assert pipeline.get_label_ids(["cat, tabby", "cat", "tabby"]) == [0, 0, 0]
    with pytest.raises(ValueError, match=r"'crane' is the name of 2 classes \[2, 3\]"):
        pipeline.get_label_ids("crane")
    with pytest.raises(ValueError, match=r"'horse' is the name of 0 classes"):
        pipeline.get_label_ids("horse")


def test_labels_in_any_form_give_the_same_image() -> None:
    pipeline = conditional(vae=tiny_kl())
    expected = run(pipeline, [1], guidance_scale=1.0)
    for form in (1, "dog", ["dog"], (1,), torch.tensor([1]), torch.tensor(1)):
        torch.testing.assert_close(run(pipeline, form, guidance_scale=1.0), expected)
    assert (run(pipeline, [0], guidance_scale=1.0) - expected).abs().max() > 1e-3
    null = run(pipeline, [1000], guidance_scale=1.0)
    assert (null - expected).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", [4, -1, 999, [1, 1001], []])
def test_a_class_that_is_not_there_is_told(wrong: Any) -> None:
    with pytest.raises(ValueError, match="is no class of this pipeline: give some of 0 to 3"):
        conditional()(wrong)


def test_one_generator_per_image_and_one_for_all() -> None:
    pipeline: Any = conditional(vae=tiny_kl(), scheduler=DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images(labels: list[int], generators: Any) -> Tensor:
        return pipeline(labels, 2.0, generators, 3, "pt").images

    both = images([0, 1], [generator(1), generator(2)])
    torch.testing.assert_close(both[1:], images([1], generator(2)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        images([0, 1], [generator(1)])


def test_forms_of_output_of_a_pipeline() -> None:
    pipeline: Any = conditional(vae=tiny_kl())
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline(1, num_inference_steps=2, generator=generator()).images
    assert picture.size == (16, 16)
    (latents,) = pipeline(1, 2.0, generator(), 2, "latent", return_dict=False)
    assert latents.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="output_type='gif' is unknown: choose from pil"):
        pipeline(1, output_type="gif")
    with pytest.raises(ValueError, match="batch_size=0"):
        UnconditionalPipeline(DDIMScheduler(), unet=tiny_unet())(0)


def test_parts_that_do_not_go_together_are_told() -> None:
    with pytest.raises(ValueError, match="no network"):
        UnconditionalPipeline(DDIMScheduler())
    with pytest.raises(ValueError, match="two networks"):
        ClassConditionalPipeline(DDIMScheduler(), tiny_dit(), tiny_unet())
    with pytest.raises(ValueError, match="takes no class labels"):
        ClassConditionalPipeline(DDIMScheduler(), unet=tiny_unet())
    with pytest.raises(ValueError, match=r"names the classes \[3\], and the network has 0 to 2"):
        conditional(tiny_dit(classes=3))


def test_the_null_label_is_given_where_a_network_wants_labels() -> None:
    """An image without a condition is the null class's."""
    network = tiny_dit(10, 3)
    without = run(UnconditionalPipeline(DDIMScheduler(), transformer=network), batch_size=2)
    with_null = run(conditional(network), [10, 10], guidance_scale=1.0)
    torch.testing.assert_close(without, with_null, rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="no accelerator here")
def test_images_do_not_depend_on_the_device() -> None:
    pipeline = conditional(vae=tiny_kl())
    expected = run(pipeline, [1], guidance_scale=2.0)
    found = run(pipeline.to(DEVICE), [1], guidance_scale=2.0).cpu()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "PNDM",
        "LMSDiscrete",
        "HeunDiscrete",
        "DEISMultistep",
        "LCM",
        "UniPCMultistep",
        "EulerAncestralDiscrete",
        "SASolver",
        "IPNDM",
        "DDIMParallel",
        "FlowMatchHeunDiscrete",
    ],
)
def test_other_schedulers_run(name: str) -> None:
    """Nothing of the loop is made for one scheduler, with a generator in `step` or without."""
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    images = run(conditional(tiny_dit(10, 3), scheduler=scheduler), [1], guidance_scale=2.0)
    assert images.isfinite().all()
