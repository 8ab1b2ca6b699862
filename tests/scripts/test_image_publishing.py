"""What the image scripts draw and keep: which classes, whose weights, which pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_curriculum.cli import main as cli
from diffusers_curriculum.randomness import key
from diffusers_curriculum.training.loop.job import Job
from diffusers_curriculum.training.parts.reconstruction import gamma_of
from diffusers_curriculum.training.publish import publisher as publishing
from diffusers_curriculum.training.publish.images import ImagePublisher
from tests.scripts.image_runs import (
    CLASS_SCRIPT,
    RESOLUTION,
    UNCONDITIONAL_SCRIPT,
    Materials,
    drawn,
    load_pipeline,
    make_materials,
    weights_after_each_step,
    write_class_folders,
)
from tests.scripts.small_runs import Record, status, train

SCRIPTS = (CLASS_SCRIPT, UNCONDITIONAL_SCRIPT)
WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS_OFFICIAL = "--ddpm_num_inference_steps"
GRID = "val_imgs_grid.png"


def opened(path: Path) -> Image.Image:
    """A picture, read whole."""
    with Image.open(path) as image:
        return image.copy()


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("materials")
    write_class_folders(folder / "named", ["ant", "bee", "cat", "3"])
    return make_materials(folder)


def run(
    materials: Materials,
    output: Path,
    script: str,
    *more: object,
    network: str = "unet",
    space: str = "pixels",
    pictures: bool = True,
) -> Record:
    """A few steps; pictures take few denoising steps."""
    argv = materials.argv(output, script, network, space, "--max_train_steps", 4, *more)
    if pictures:
        argv.remove("--no_pictures")
        steps = "--validation_inference_steps" if script == CLASS_SCRIPT else STEPS_OFFICIAL
        argv += [steps, "3"] if steps not in argv else []
    return train(argv, script=script)


@contextmanager
def pictures_noted() -> Iterator[list[tuple[str, int, list[np.ndarray], list[str]]]]:
    """Tag, step, pictures and captions of everything that is sent to the trackers."""
    noted: list[Any] = []

    def log(accelerator: Any, tag: str, images: Any, captions: Any, step: int) -> None:
        noted.append((tag, step, [np.asarray(image) for image in images], list(captions)))

    with mock.patch.object(publishing, "log_images", log):
        yield noted


# -- pictures --------------------------------------------------------------------------------------


def test_each_row_shows_a_class_by_name_or_number(materials: Materials, tmp_path: Path) -> None:
    data = ("--train_data_dir", materials.folder / "named")  # sorted: 3, ant, bee, cat
    more = ("--validation_classes", "cat", "1", "3", "--validation_images_per_class", 2)
    with pictures_noted() as noted:
        run(materials, tmp_path, CLASS_SCRIPT, *data, *more)
    ((tag, step, images, captions),) = noted
    assert (tag, step) == ("test", 4)
    assert captions == ["cat", "ant", "3"]  # a class is called "3": the name wins
    grid = np.asarray(opened(tmp_path / GRID))
    assert grid.shape == (3 * RESOLUTION, 2 * RESOLUTION, 3)
    rows = np.stack(images).reshape(3, 2, RESOLUTION, RESOLUTION, 3)
    assert np.array_equal(grid, rows.transpose(0, 2, 1, 3, 4).reshape(grid.shape))

    # They are those of the pipeline for classes 3, 1 and 0, each from noise of its own
    seen: list[Any] = []
    sampled = ImagePublisher._sampled

    def noting(publisher: Any, pipeline: Any, numbers: Any, labels: Any, *rest: Any) -> Any:
        seen.append((list(numbers), labels))
        return sampled(publisher, pipeline, numbers, labels, *rest)

    with mock.patch.object(ImagePublisher, "_sampled", noting), pictures_noted() as again:
        run(materials, tmp_path / "again", CLASS_SCRIPT, *data, *more)
    assert seen == [([0, 1, 2, 3], [3, 3, 1, 1]), ([4, 5], [0, 0])]  # as many as are trained on
    assert np.array_equal(np.stack(again[0][2]), np.stack(images))
    assert len({image.tobytes() for image in images}) == 6


@pytest.mark.parametrize("given", ["dog", "4", "1.0"])
def test_an_unknown_class_is_refused_with_those_there_are(
    materials: Materials, tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = materials.argv(tmp_path, CLASS_SCRIPT, "unet", "pixels")
    argv.remove("--no_pictures")
    argv += ["--train_data_dir", str(materials.folder / "named"), "--validation_classes", given]
    assert status(argv, CLASS_SCRIPT) == 2
    told = capsys.readouterr().err
    assert f"--validation_classes {given}: there is no such class" in told
    assert "0 (3), 1 (ant), 2 (bee), 3 (cat)" in told


@pytest.mark.parametrize(
    ("script", "flag"),
    [(CLASS_SCRIPT, "--validation_inference_steps"), (UNCONDITIONAL_SCRIPT, STEPS_OFFICIAL)],
)
def test_steps_that_the_scheduler_cannot_do_are_refused_before_training(
    materials: Materials, tmp_path: Path, script: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = materials.argv(tmp_path, script, "unet", "pixels", "--ddpm_num_steps", 20)
    argv.remove("--no_pictures")
    assert status([*argv, flag, "21"], script) == 2
    told = capsys.readouterr().err
    assert f"{flag} is 21" in told
    assert "20 noise levels" in told
    pndm = [*argv, flag, "2", "--sampling_scheduler", "PNDMScheduler"]  # it needs some more
    assert status(pndm, script) == 2
    assert f"{flag} is 2, which PNDMScheduler cannot do" in capsys.readouterr().err
    assert train([*argv, flag, "20", "--max_train_steps", "1"], script=script).numbers == [0]


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (6, (2, 3)), (7, (1, 7)), (16, (4, 4))])
def test_the_unconditional_grid_is_about_square(
    materials: Materials, tmp_path: Path, count: int, shape: tuple[int, int]
) -> None:
    more = ("--eval_batch_size", count, "--max_train_steps", 1)
    with pictures_noted() as noted:
        run(materials, tmp_path, UNCONDITIONAL_SCRIPT, *more)
    ((_, _, images, captions),) = noted
    assert (len(images), len(captions)) == (count, shape[0])
    assert opened(tmp_path / GRID).size == (shape[1] * RESOLUTION, shape[0] * RESOLUTION)
    assert len({image.tobytes() for image in images}) == count


# 18 images, batches of 4: epochs 0, 1, 2 end in steps 5, 9, 14
@pytest.mark.parametrize(
    ("script", "more", "due"),
    [
        (CLASS_SCRIPT, ("--validation_steps", 4), [4, 8, 12]),
        (CLASS_SCRIPT, ("--validation_epochs", 1), [5, 9]),
        (CLASS_SCRIPT, ("--validation_epochs", 2), [5]),
        (UNCONDITIONAL_SCRIPT, ("--save_images_epochs", 1), [5, 9]),
        (UNCONDITIONAL_SCRIPT, ("--save_images_epochs", 2), [5]),
    ],
)
def test_when_pictures_are_drawn(
    materials: Materials, tmp_path: Path, script: str, more: tuple[object, ...], due: list[int]
) -> None:
    few = ("--eval_batch_size", 1) if script == UNCONDITIONAL_SCRIPT else ()
    with pictures_noted() as noted:
        run(materials, tmp_path, script, "--max_train_steps", 14, *more, *few)
    assert [(tag, step) for tag, step, *_ in noted] == [
        *(("validation", step) for step in due),
        ("test", 14),
    ]


def test_pictures_are_a_function_of_the_seed(materials: Materials, tmp_path: Path) -> None:
    """DiTPipeline draws the noise of a DDPMScheduler's steps from the global generator."""
    more = ("--sampling_scheduler", "DDPMScheduler", "--validation_images_per_class", 1)
    options: dict[str, Any] = {"network": "dit", "space": "AutoencoderKL"}
    grids = []
    for attempt in range(2):
        argv = ("--resume_from_checkpoint", "latest", "--checkpointing_steps", 4)
        run(materials, tmp_path, CLASS_SCRIPT, *more, *argv, **options)
        torch.manual_seed(attempt)
        grids.append(np.asarray(opened(tmp_path / GRID)))
    index = json.loads((tmp_path / "model_index.json").read_text("utf-8"))
    assert (index["_class_name"], index["scheduler"][1]) == ("DiTPipeline", "DDPMScheduler")
    assert np.array_equal(grids[0], grids[1])
    assert grids[0].std() > 0


# -- whose weights ---------------------------------------------------------------------------------


def folder_of(script: str) -> str:
    """Where the networks of these tests are kept: a DiT with classes, a U-Net without."""
    return "transformer" if script == CLASS_SCRIPT else "unet"


def mean_of(course: Sequence[dict[str, torch.Tensor]], shares: np.ndarray) -> dict[str, np.ndarray]:
    return {
        name: np.tensordot(shares, np.stack([at[name].double().numpy() for at in course]), 1)
        for name in course[0]
    }


def averaged(script: str, kind: str, course: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The average that is asked for, from the weights after every step, all at once."""
    count = len(course)
    if kind == "--power_ema":
        edges = np.arange(count + 1) / count
        return mean_of(course, np.diff(edges ** (gamma_of(0.1) + 1)))
    decays = [0.5] * count
    if script == UNCONDITIONAL_SCRIPT:  # as in diffusers: warm-up with inv_gamma 1, power 0.75
        decays = [min(0.5, 1 - (1 + max(0, step)) ** -0.75) for step in range(count)]
    else:  # (1 + step) / (10 + step)
        decays = [min(0.5, (1 + step) / (10 + step)) for step in range(count)]
    decays[0] = 0.0  # diffusers' first update takes the weights over
    shares = [(1 - own) * np.prod(decays[step + 1 :]) for step, own in enumerate(decays)]
    assert np.isclose(sum(shares), 1)
    return mean_of(course, np.array(shares))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["--use_ema", "--power_ema"])
def test_the_average_is_exported_and_drawn(
    materials: Materials, tmp_path: Path, script: str, kind: str
) -> None:
    network = "dit" if script == CLASS_SCRIPT else "unet"
    decay = "--ema_decay" if script == CLASS_SCRIPT else "--ema_max_decay"
    more = ("--use_ema", decay, 0.5) if kind == "--use_ema" else ("--power_ema", 0.1, 0.05)
    more += ("--learning_rate", 1e-2, "--max_train_steps", 8, "--lr_scheduler", "constant")
    with weights_after_each_step() as course, pictures_noted() as noted:
        run(materials, tmp_path, script, *more, network=network)
    assert len(course) == 8
    exported = load_file(tmp_path / folder_of(script) / WEIGHTS)
    expected = averaged(script, kind, course)
    for name in set(exported) - {"pos_embed.pos_embed"}:
        assert np.allclose(exported[name].double().numpy(), expected[name], rtol=1e-4, atol=1e-6)
    last = max(float((exported[n] - course[-1][n]).abs().max()) for n in exported)
    assert last > 1e-3  # it is not what was trained last

    # The pictures: drawn anew by hand with these weights, and with the last ones
    _, _, images, _ = noted[-1]
    with_average, with_last = (
        redrawn(tmp_path, script, weights) for weights in (exported, course[-1])
    )
    assert np.array_equal(np.stack(images), with_average)
    assert not np.array_equal(np.stack(images), with_last)


def redrawn(folder: Path, script: str, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """The pictures of a run, with other weights."""
    pipeline = load_pipeline(folder)
    network = getattr(pipeline, folder_of(script))
    network.load_state_dict(weights)
    labels = [label for label in range(3) for _ in range(8)]
    count = len(labels) if script == CLASS_SCRIPT else 16
    generators = [
        torch.Generator().manual_seed(key(3, number, purpose="picture") >> 65)
        for number in range(count)
    ]
    options: dict[str, Any] = {"generator": generators, "num_inference_steps": 3}
    if script == CLASS_SCRIPT:
        options |= {"class_labels": labels, "guidance_scale": 1.5}
    else:
        options |= {"batch_size": count}
    images = pipeline(output_type="np", **options).images
    return (images * 255).round().astype(np.uint8)


# -- pipelines on the way --------------------------------------------------------------------------


def test_a_pipeline_is_kept_on_the_way(materials: Materials, tmp_path: Path) -> None:
    """After epoch 0, as in the official script, and with the averaged weights."""
    after_update, kept = Job._after_update, {}

    def looking(job: Any, step: int, *args: Any) -> None:
        after_update(job, step, *args)
        if (tmp_path / "model_index.json").exists():
            kept[step + 1] = load_file(tmp_path / "unet" / WEIGHTS)["conv_in.bias"].clone()
        if step + 1 == 5:
            pipeline = load_pipeline(tmp_path)
            assert type(pipeline) is DDPMPipeline
            assert np.isfinite(drawn(pipeline, conditional=False)).all()
            assert "DDPMPipeline" in (tmp_path / "README.md").read_text("utf-8")
            assert torch.equal(kept[5], average(job)["conv_in.bias"])
            assert not torch.equal(kept[5], job.network.conv_in.bias)

    def average(job: Any) -> dict[str, torch.Tensor]:
        names = [name for name, _ in job.network.named_parameters()]
        return dict(zip(names, job.run.averages.ema.shadow_params, strict=True))

    more = ("--save_model_epochs", 2, "--use_ema", "--ema_max_decay", 0.5, "--learning_rate", 1e-2)
    with mock.patch.object(Job, "_after_update", looking):
        run(
            materials,
            tmp_path,
            UNCONDITIONAL_SCRIPT,
            *more,
            "--max_train_steps",
            16,
            pictures=False,
        )
    assert min(kept) == 5
    changes = [step for step in kept if step > 5 and not torch.equal(kept[step], kept[step - 1])]
    assert changes == [14]  # epoch 2 ends in it
    final = load_file(tmp_path / "unet" / WEIGHTS)["conv_in.bias"]
    assert not torch.equal(final, kept[16])


# -- going on from what was exported ---------------------------------------------------------------

EXPORTS = [
    (CLASS_SCRIPT, "dit", "AutoencoderKL", ()),
    (CLASS_SCRIPT, "unet", "pixels", ("--formulation", "flow", "--flow_shift", 2)),
    (CLASS_SCRIPT, "dit", "ViTVQModel", ("--formulation", "edm")),
    (UNCONDITIONAL_SCRIPT, "unet", "pixels", ("--prediction_type", "v_prediction")),
    (UNCONDITIONAL_SCRIPT, "dit", "VQModel", ("--ddpm_beta_schedule", "squaredcos_cap_v2")),
    (CLASS_SCRIPT, "unet", "pixels", ("--sampling_scheduler", "HeunDiscreteScheduler")),
    (CLASS_SCRIPT, "unet", "pixels", ("--sampling_scheduler", "DPMSolverMultistepScheduler")),
]


@pytest.mark.parametrize(("script", "network", "space", "more"), EXPORTS)
def test_a_run_goes_on_from_its_own_export(
    materials: Materials,
    tmp_path: Path,
    script: str,
    network: str,
    space: str,
    more: tuple[object, ...],
) -> None:
    """It has the formulation, schedule and latents of the first run, with no flag repeated."""
    first = run(
        materials, tmp_path / "first", script, *more, network=network, space=space, pictures=False
    )
    argv = materials.argv(tmp_path / "second", script, network, "pixels", "--max_train_steps", 1)
    argv[0:2] = ["--pretrained_model_name_or_path", str(tmp_path / "first")]
    with weights_after_each_step() as course:
        second = train([*argv, "--learning_rate", "0"], script=script)
    trained, again = first.last, second.last
    assert again.space.kind == trained.space.kind
    assert again.objective.prediction_type == trained.objective.prediction_type
    assert torch.equal(again.sampler.levels.log_snr, trained.sampler.levels.log_snr)
    before = load_file(tmp_path / "first" / folder_of_network(network) / WEIGHTS)
    assert all(torch.equal(course[0][name], weight) for name, weight in before.items())
    first_index, second_index = (
        json.loads((tmp_path / name / "model_index.json").read_text("utf-8"))
        for name in ("first", "second")
    )
    assert first_index == second_index
    assert scheduler_of(tmp_path / "first") == scheduler_of(tmp_path / "second")


def folder_of_network(network: str) -> str:
    return "transformer" if network == "dit" else "unet"


def scheduler_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scheduler/scheduler_config.json").read_text("utf-8"))


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler"])
def test_another_sampler_has_the_noise_levels_that_were_trained(
    materials: Materials, tmp_path: Path, name: str
) -> None:
    """The defaults of these classes for beta are others."""
    more = ("--sampling_scheduler", name, "--max_train_steps", 1)
    run(materials, tmp_path, CLASS_SCRIPT, *more, pictures=False)
    betas = load_pipeline(tmp_path).scheduler.betas.numpy()
    assert np.allclose(betas, np.linspace(1e-4, 0.02, 1000), rtol=1e-5)


def test_a_sampler_of_other_noise_levels_is_refused(
    materials: Materials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--sampling_scheduler", "CogVideoXDDIMScheduler", "--max_train_steps", 1)
    argv = materials.argv(tmp_path, CLASS_SCRIPT, "unet", "pixels", *more)
    assert status(argv, CLASS_SCRIPT) == 2
    assert "CogVideoXDDIMScheduler cannot sample" in capsys.readouterr().err


@pytest.mark.parametrize("space", ["AutoencoderKL", "ViTVQModel"])
def test_the_autoencoder_is_exported_byte_for_byte(
    materials: Materials, tmp_path: Path, space: str
) -> None:
    base = materials.folder / space
    if space == "AutoencoderKL":  # saved in half precision
        autoencoder: Any = AutoencoderKL.from_pretrained(base)
        base = tmp_path / "half"
        autoencoder.half().save_pretrained(base)
    vae = ("--pretrained_vae_model_name_or_path", base)
    run(materials, tmp_path / "out", CLASS_SCRIPT, *vae, network="dit", space=space, pictures=False)
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "out/vae" / name).read_bytes() == (base / name).read_bytes()
    # the code of one that diffusers has not
    assert (tmp_path / "out/vae/vit_vq.py").is_file() == (space == "ViTVQModel")
    assert load_pipeline(tmp_path / "out").vae is not None


# -- the average, chosen afterwards ----------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_average_of_another_width_is_a_pipeline(
    materials: Materials, tmp_path: Path, script: str
) -> None:
    out, space = tmp_path / "run", "AutoencoderKL" if script == CLASS_SCRIPT else "pixels"
    network = "dit" if script == CLASS_SCRIPT else "unet"
    more = ("--power_ema", 0.05, 0.1, "--power_ema_snapshot_steps", 4, "--max_train_steps", 60)
    more += ("--power_ema_dtype", "float32")
    with weights_after_each_step() as course:
        run(
            materials,
            out,
            script,
            *more,
            "--learning_rate",
            1e-2,
            network=network,
            space=space,
            pictures=False,
        )
    command = ["reconstruct-ema", str(out), "--sigma_rel", "0.075", "--output_dir"]
    assert cli([*command, str(tmp_path / "wide")]) == 0
    edges = np.arange(61) / 60
    expected = mean_of(course, np.diff(edges ** (gamma_of(0.075) + 1)))
    found = load_file(tmp_path / "wide" / folder_of(script) / WEIGHTS)
    exported = load_file(out / folder_of(script) / WEIGHTS)
    names = [name for name in found if name != "pos_embed.pos_embed"]
    difference, apart = (
        np.sqrt(sum(np.square(a[n].double().numpy() - expected[n]).sum() for n in names))
        for a in (found, exported)
    )
    assert difference < 0.1 * apart
    first, second = (load_pipeline(folder) for folder in (out, tmp_path / "wide"))
    assert type(first) is type(second)
    conditional = script == CLASS_SCRIPT
    modules = [{path.name for path in folder.glob("*.py")} for folder in (out, tmp_path / "wide")]
    assert modules[0] == modules[1]
    images = [drawn(pipeline, conditional) for pipeline in (first, second)]
    assert np.isfinite(images).all()
    assert not np.array_equal(images[0], images[1])
    if conditional:
        assert second.labels == first.labels == {"0": 0, "1": 1, "2": 2}
