"""Networks and latent spaces from a command line, and what tells them apart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel, UNet2DModel

from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.models.networks import build_network, null_class, num_classes
from diffusers_curriculum.pipelines import ClassConditionalPipeline
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts import images as parts
from tests.scripts.image_runs import make_materials
from tests.scripts.small_runs import TINY_DIT, TINY_UNET, write_json
from tests.training.command_lines import parse_class_args, parse_unconditional_args

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs, autoencoders, and a pipeline of three classes in latents of 4 channels, side 4."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("components")
    make_materials(root)
    save_pipeline(root / "pipeline", root, classes=3)
    return root


def save_pipeline(place: Path, root: Path, **sizes: Any) -> Path:
    """Save a class-conditional pipeline with a U-Net."""
    settings: dict[str, Any] = {"channels": 4, "sample_size": 4, "num_classes": sizes["classes"]}
    settings |= {name: value for name, value in sizes.items() if name != "classes"}
    unet = build_network(str(root / "unet.json"), **settings)
    vae = AutoencoderKL.from_pretrained(root / "AutoencoderKL")
    names = {number: f"class {number}" for number in range(sizes["classes"])}
    pipeline = ClassConditionalPipeline(DDPMScheduler(), unet=unet, vae=vae, id2label=names)
    pipeline.save_pretrained(place)
    return place


def parsed(*line: object, conditional: bool = True) -> Arguments:
    words = ["--dataset_name", "some/data", "--resolution", "8", *map(str, line)]
    return (parse_class_args if conditional else parse_unconditional_args)(words)


def made(args: Arguments, classes: int | None = 3, seed: int = 0) -> Any:
    return parts.make_network(args, parts.load_space(args), classes, seed)


# -- the space -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [("AutoencoderKL", (4, 4, 4)), ("VQModel", (4, 4, 4)), ("ViTVQModel", (4, 4, 4))],
)
def test_an_autoencoder_makes_the_space(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    args = parsed("--model_config", "DiT-S/2", "--pretrained_vae_model_name_or_path", folder / name)
    space = parts.load_space(args)
    assert (space.kind, space.shape(8)) == (name, shape)
    assert {p.dtype for p in space.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in space.model.parameters())


def test_where_the_autoencoder_comes_from(folder: Path) -> None:
    own, other = str(folder / "pipeline"), str(folder / "VQModel")
    flag = ("--pretrained_vae_model_name_or_path",)
    base = ("--model_config", "DiT-S/2")
    pipeline = ("--pretrained_model_name_or_path", own)
    assert parts.autoencoder_source(parsed(*base)) is None
    assert parts.autoencoder_source(parsed(*base, *flag, other)) == (other, None)
    assert parts.autoencoder_source(parsed(*base, *flag, own)) == (own, "vae")
    assert parts.autoencoder_source(parsed(*pipeline)) == (own, "vae")
    assert parts.autoencoder_source(parsed(*pipeline, *flag, other)) == (other, None)
    assert parts.load_space(parsed(*pipeline)).kind == "AutoencoderKL"
    assert parts.load_space(parsed(*base)).kind == "pixels"


@pytest.mark.parametrize(
    ("place", "resolution", "told"),
    [
        ("AutoencoderKL", 9, "resolution=9 does not fit.*multiple of 2"),
        ("ViTVQModel", 16, "resolution=16 does not fit.*give 8"),
        ("images", 8, "images.*config.json cannot be loaded"),
        ("pipeline/unet", 8, "holds a UNet2DModel, which is no known autoencoder"),
    ],
)
def test_a_space_that_does_not_fit_is_refused(
    folder: Path, place: str, resolution: int, told: str
) -> None:
    line = ("--model_config", "DiT-S/2", "--pretrained_vae_model_name_or_path", folder / place)
    args = parsed(*line, "--resolution", resolution)
    with pytest.raises(UsageError, match=f"(?s)--pretrained_vae_model_name_or_path: .*{told}"):
        parts.load_space(args)


# -- the network -----------------------------------------------------------------------------------


def test_a_network_is_built_for_its_space_and_classes(folder: Path) -> None:
    vae = ("--pretrained_vae_model_name_or_path", folder / "AutoencoderKL")
    dit = made(parsed("--model_config", folder / "dit.json", *vae, "--learned_variance", "vlb"))
    assert isinstance(dit, DiTTransformer2DModel)
    assert [dit.config[k] for k in ("in_channels", "out_channels", "sample_size")] == [4, 8, 4]
    assert (num_classes(dit), null_class(dit)) == (1000, 1000)
    unet = made(parsed("--model_config", folder / "unet.json"))
    assert isinstance(unet, UNet2DModel)
    assert [unet.config[k] for k in ("in_channels", "out_channels", "sample_size")] == [3, 3, 8]
    assert (num_classes(unet), null_class(unet)) == (3, 3)
    args = parsed("--model_config_name_or_path", folder / "unet.json", conditional=False)
    assert made(args, None).config.get("num_class_embeds") is None


def test_the_first_weights_follow_from_the_seed(folder: Path) -> None:
    args, before = parsed("--model_config", folder / "unet.json"), torch.get_rng_state()
    first, again, other = (made(args, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_pretrained_network_is_taken_over(folder: Path) -> None:
    args = parsed("--pretrained_model_name_or_path", folder / "pipeline")
    for classes in (2, 3):
        network = made(args, classes)
        stored = UNet2DModel.from_pretrained(folder / "pipeline" / "unet").state_dict()
        assert num_classes(network) == 3
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert all(torch.equal(value, stored[k]) for k, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("line", "classes", "told"),
    [
        ((), 4, "knows 3 classes, and the data has 4"),
        (("--resolution", 16), 3, "4 channels of side 4, and --resolution 16 gives 4 of side 8"),
        (("--learned_variance", "vlb"), 3, "4 output channels.*vlb: give none"),
    ],
)
def test_a_pretrained_network_that_does_not_fit_is_refused(
    folder: Path, line: tuple[object, ...], classes: int, told: str
) -> None:
    args = parsed("--pretrained_model_name_or_path", folder / "pipeline", *line)
    with pytest.raises(UsageError, match=f"(?s)--pretrained_model_name_or_path '.*{told}"):
        made(args, classes)


def test_a_learned_variance_is_not_passed_over(folder: Path, tmp_path: Path) -> None:
    place = save_pipeline(tmp_path / "twice", folder, classes=2, out_channels=8)
    base = ("--pretrained_model_name_or_path", place)
    with pytest.raises(UsageError, match=r"8 output channels.*none: give vlb.*or ignore"):
        made(parsed(*base), 2)
    assert made(parsed(*base, "--learned_variance", "ignore"), 2).config["out_channels"] == 8


def test_a_pipeline_without_a_network_is_refused(folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder / "pipeline", tmp_path / "without")
    index = (place / "model_index.json").read_text()
    (place / "model_index.json").write_text(
        index.replace('"UNet2DModel"', "null").replace(
            '"unet": [\n    "diffusers",', '"unet": [\n    null,'
        )
    )
    args = parsed("--pretrained_model_name_or_path", place)
    with pytest.raises(UsageError, match="has no transformer or unet to train"):
        made(args)


MISFITS: dict[str, tuple[dict[str, Any], tuple[object, ...], str]] = {
    "patch": (TINY_DIT | {"patch_size": 3}, (), "patch_size=3 does not divide the 8 x 8"),
    "channels": (TINY_UNET | {"in_channels": 2}, (), "takes 2 channels, and images have 1"),
    "outputs": (TINY_UNET | {"out_channels": 3}, ("--learned_variance", "vlb"), "6 is asked for"),
    "side": (TINY_UNET | {"sample_size": 32}, (), "sample_size=32, but 8 is asked for"),
    "classes": (TINY_UNET | {"num_class_embeds": 3}, (), "num_class_embeds=3.*need 4"),
    "halves": (TINY_UNET, ("--resolution", 9), "2 levels do not halve the 9 x 9"),
    "class": (TINY_UNET | {"_class_name": "VQModel"}, (), "of class VQModel"),
    "setting": (TINY_UNET | {"colour": 1}, (), "does not take: colour"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_config_that_contradicts_the_rest_is_refused(tmp_path: Path, name: str) -> None:
    config, line, told = MISFITS[name]
    args = parsed("--model_config", write_json(tmp_path / "config.json", config), *line)
    with pytest.raises(UsageError, match=f"(?s)--model_config: .*{told}"):
        made(args)


# -- what tells models apart -----------------------------------------------------------------------


def test_facts_tell_models_apart(folder: Path, tmp_path: Path) -> None:
    def facts(*line: object, classes: int | None = 3) -> str:
        return str(parts.model_facts(parsed(*line), classes))

    vae = "--pretrained_vae_model_name_or_path"
    same = write_json(tmp_path / "same.json", dict(reversed(TINY_DIT.items())))
    deeper = write_json(tmp_path / "deeper.json", TINY_DIT | {"num_layers": 2})
    base = ("--model_config", folder / "dit.json")
    assert facts(*base) == facts("--model_config", same)  # whatever its name and order
    others = [
        facts(*base, classes=4),
        facts("--model_config", deeper),
        facts("--model_config", "DiT-S/2"),
        facts("--model_config", "DiT-S/4"),
        facts("--pretrained_model_name_or_path", folder / "pipeline"),
        *(facts(*base, vae, folder / kind) for kind in ("AutoencoderKL", "VQModel", "ViTVQModel")),
    ]
    assert len({facts(*base), *others}) == 9
    moved = shutil.copytree(folder / "VQModel", tmp_path / "moved")
    assert facts(*base, vae, moved) == others[-2]


def test_the_folder_is_named_after_the_network(folder: Path) -> None:
    assert parts.folder_name(made(parsed("--model_config", folder / "unet.json"))) == "unet"
    assert parts.folder_name(made(parsed("--model_config", folder / "dit.json"))) == "transformer"


def test_a_ready_network_trains(folder: Path) -> None:
    args = parsed("--model_config", folder / "dit.json", "--gradient_checkpointing")
    network = made(args).requires_grad_(False).eval()
    parts.ready(args, network, CPU)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert network.is_gradient_checkpointing


def test_what_does_not_fit_is_told_from_the_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "load_network", lambda *a, **k: pytest.fail("weights are loaded"))
    pipeline = ("--pretrained_model_name_or_path", folder / "pipeline")
    parts.check_network(parsed(*pipeline), labelled=True)
    for more, told in (
        (("--resolution", 16), "takes 4 channels of side 4, and --resolution 16 gives 4 of side 8"),
        (("--learned_variance", "vlb"), "has 4 output channels, but --learned_variance is vlb"),
        (("--variant", "fp16"), "--variant fp16: no weights of .* are of it"),
    ):
        with pytest.raises(UsageError, match=told):
            parts.check_network(parsed(*pipeline, *more), labelled=True)
    with pytest.raises(UsageError, match="knows 3 classes, and the data has 4"):
        made(parsed(*pipeline), classes=4)


# -- a repository on the Hub -----------------------------------------------------------------------


def on_the_hub(monkeypatch: pytest.MonkeyPatch) -> Arguments:
    """A pipeline of the Hub at a revision; its index is there, and the rest is noted."""
    index = {"vae": ["diffusers", "AutoencoderKL"], "transformer": ["diffusers", "x"]}
    monkeypatch.setattr(parts, "pipeline_index", lambda args: index)
    args = parsed("--model_config", "DiT-S/2")
    args.model_config, args.pretrained_model_name_or_path = None, "some/pipeline"
    args.revision = "abc123"
    return args


def test_the_revision_tells_an_autoencoder_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    args = on_the_hub(monkeypatch)
    expected = {"name": "some/pipeline", "subfolder": "vae", "revision": "abc123"}
    assert parts.autoencoder_identity(args) == expected
    args.pretrained_vae_model_name_or_path = "some/vae"  # another repository: no revision of it
    expected = {"name": "some/vae", "subfolder": None, "revision": None}
    assert parts.autoencoder_identity(args) == expected


def test_the_autoencoder_is_looked_at_in_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    args, asked = on_the_hub(monkeypatch), []

    def empty(path: str, revision: str | None, subfolder: str | None) -> LatentSpace:
        asked.append((path, revision, subfolder))
        return LatentSpace.of(None)

    def unknown(path: str, revision: str | None, name: str) -> Any:
        asked.append((path, revision, name))
        raise ValueError("far away")

    monkeypatch.setattr(LatentSpace, "empty", empty)
    monkeypatch.setattr(parts, "empty_network", unknown)
    with pytest.raises(UsageError, match="far away"):
        parts.check_network(args, labelled=True)
    assert asked == [("some/pipeline", "abc123", name) for name in ("vae", "transformer")]
