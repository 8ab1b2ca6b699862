"""The autoencoder's training script: exact resume, what it measures, what it refuses."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_curriculum.models.vit_vq import ViTVQModel
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop import job
from diffusers_curriculum.training.process.stopping import Stopped
from tests.scripts.small_runs import reset_accelerate, write_images

EXAMPLES = Path(__file__).parents[2] / "examples" / "autoencoder"
_WIDTHS = {"dim": 16, "depth": 1, "heads": 2, "mlp": 16}
MODEL = [
    *("patch_size=4", "codebook_size=32", "codebook_dim=8"),
    *(f"{half}_{name}={n}" for half in ("encoder", "decoder") for name, n in _WIDTHS.items()),
]
Train = Callable[..., Path]


def argv(folder: Path, output: Path, *more: object) -> list[str]:
    return [
        *("--train_data_dir", str(folder / "images"), "--cache_dir", str(folder / "cache")),
        *("--output_dir", str(output), "--resolution", "8", "--train_batch_size", "2"),
        *("--learning_rate", "1e-3", "--seed", "7", "--lr_warmup_steps", "0"),
        *("--discriminator_width", "4", "--model_args", *MODEL),
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqgan")
    write_images(folder / "images", 18)
    held_out = write_images(folder / "held_out", 5, size=8)
    (held_out / "metadata.jsonl").unlink()
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's module, found as when it is run as a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_vit_vqgan")


@pytest.fixture
def train(script: ModuleType, data: Path, tmp_path: Path) -> Train:
    """Run the script into a folder of this name, and return that."""

    def run(name: str, *more: object) -> Path:
        reset_accelerate()
        script.main(argv(data, tmp_path / name, *more))
        return tmp_path / name

    return run


def artefacts(folder: Path) -> dict[str, bytes]:
    """Every file of state, bit for bit."""
    files = (path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_stopped_run_goes_on_bit_for_bit(
    train: Train, script: ModuleType, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    settings = (
        *("--max_train_steps", 7, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 7),
        *("--codebook_patience", 2, "--discriminator_start", 2, "--r1_interval", 2),
        *("--log_every", 3, "--random_flip", "--lr_scheduler", "cosine"),
        *("--logit_laplace_weight", 0.1, "--mixed_precision", precision),
    )
    whole = train("whole", *settings)
    step = job.make_update

    def interrupted(run: Any, number: int, *rest: Any) -> Any:
        if number == 3:  # told in the middle of the fourth step, which is finished and saved
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, number, *rest)

    monkeypatch.setattr(job, "make_update", interrupted)
    with pytest.raises(Stopped):
        train("parts", *settings)
    monkeypatch.setattr(job, "make_update", step)
    parts = whole.parent / "parts"
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-4"]
    torch.manual_seed(999)  # nothing may hang on the global generator's state
    train("parts", *settings, "--resume_from_checkpoint", "latest")
    first, second = (artefacts(folder / "checkpoint-7") for folder in (whole, parts))
    assert {"tracker_critic.safetensors", "optimizer.safetensors"} < first.keys()
    assert "vit_vq/diffusion_pytorch_model.safetensors" in first
    for name in first.keys() - {"manifest.json"}:
        assert first[name] == second[name], name
    assert first.keys() == second.keys()
    for name in ("metrics.json", "diffusion_pytorch_model.safetensors", "reconstructions.png"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert list((whole / "checkpoint-7").rglob("*.bin")) == []


def test_the_critic_waits_for_its_start(train: Train) -> None:
    """Until then the autoencoder trains as it does without one, and the critic does not."""
    alone = train("alone", "--max_train_steps", 3, "--adversarial_weight", 0)
    settings = ("--max_train_steps", 4, "--checkpointing_steps", 3)
    waiting = train("waiting", *settings, "--discriminator_start", 3)
    late = train("late", *settings, "--discriminator_start", 100)
    name = "vit_vq/diffusion_pytorch_model.safetensors"
    before = load_file(waiting / "checkpoint-3" / name)
    for key, tensor in load_file(alone / "diffusion_pytorch_model.safetensors").items():
        if not key.startswith("quantise.count"):
            assert torch.equal(tensor, before[key]), key
    # the fourth step is the first with a critic
    file = "diffusion_pytorch_model.safetensors"
    assert not torch.equal(
        load_file(waiting / file)["to_code.weight"], load_file(late / file)["to_code.weight"]
    )
    critic = "tracker_critic.safetensors"
    states = [load_file(folder / "checkpoint-3" / critic) for folder in (waiting, late)]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert not any("exp_avg" in key for key in states[0])


def test_neither_side_gets_the_others_gradients(
    script: ModuleType, data: Path, tmp_path: Path
) -> None:
    device = torch.device("cpu")
    accelerator = SimpleNamespace(device=device, num_processes=1, is_main_process=True)
    args = script.VQGAN().parse(argv(data, tmp_path))
    critic = importlib.import_module("vqgan_losses").Adversary(args, accelerator, seed=0)
    images, ours = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8).requires_grad_()
    critic.generator_loss(ours).backward()
    assert all(p.grad is None for p in critic.model.parameters())
    before = torch.clone(ours.grad)  # type: ignore
    assert before.abs().sum() > 0
    critic.backward(images, ours, step=0)
    assert torch.equal(ours.grad, before)  # type: ignore
    assert all(p.grad is not None for p in critic.model.parameters())


def test_pieces_of_a_batch_make_the_same_update(train: Train) -> None:
    settings = ("--max_train_steps", 3, "--adversarial_weight", 0, "--max_grad_norm", "inf")
    one = train("one", *settings, "--train_batch_size", 4)
    two = train("two", *settings, "--gradient_accumulation_steps", 2)
    file = "diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(one / file), load_file(two / file)
    for key in ours:
        if key.endswith("to_qkv.bias"):
            continue  # keys' bias has no effect: its gradient is rounding, which Adam makes large
        assert torch.allclose(ours[key].double(), theirs[key].double(), atol=2e-5), key


def test_another_objective_is_not_gone_on_with(train: Train) -> None:
    train("run", "--max_train_steps", 1, "--checkpointing_steps", 1)
    more = ("--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    with pytest.raises(UsageError, match=r"objective\.r1_gamma is 5\.0, was 10\.0"):
        train("run", *more, "--r1_gamma", 5)
    changed = [*MODEL[:1], "codebook_size=16", *MODEL[2:]]
    with pytest.raises(UsageError, match=r"model\.codebook_size is 16, was 32"):
        train("run", *more, "--model_args", *changed)
    train("run", *more, "--r1_gamma", 5, "--allow_config_change", "objective")


# -- what it leaves --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["rms", "std"])
def test_what_a_run_measures(train: Train, data: Path, scale: str) -> None:
    held_out = data / "held_out"
    folder = train(
        "run", "--max_train_steps", 4, "--validation_data_dir", held_out, "--latent_scale", scale
    )
    told = json.loads((folder / "metrics.json").read_text())
    model: Any = ViTVQModel.from_pretrained(folder)
    pictures = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(held_out.glob("*.png"))]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        output = model(pixels.float())
    errors = [
        np.mean((o.clamp(-1, 1).numpy().astype(float) - p.numpy()) ** 2) / 4
        for o, p in zip(output.sample, pixels, strict=True)
    ]
    assert told["held_out"]["images"] == 5
    assert told["held_out"]["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-5)
    assert told["held_out"]["psnr_of_mean_error"] == pytest.approx(
        -10 * math.log10(np.mean(errors)), rel=1e-5
    )
    counts = np.bincount(output.indices.flatten().numpy(), minlength=32)
    shares = counts[counts > 0] / counts.sum()
    assert told["held_out"]["codebook_used"] == np.mean(counts > 0)
    perplexity = math.exp(-np.sum(shares * np.log(shares)))
    assert told["held_out"]["codebook_perplexity"] == pytest.approx(perplexity)
    latents = output.latents.numpy().astype(float)
    spread = np.sqrt(np.mean(latents.var((0, 2, 3))))
    assert told["held_out"]["latent_std"] == pytest.approx(spread)
    assert told["training"]["latent_rms"] == pytest.approx(1 / math.sqrt(8))
    assert told["training"]["images"] == 18
    assert model.config.scaling_factor == told["scaling_factor"]
    assert told["scaling_factor"] == pytest.approx(1 / told["training"][f"latent_{scale}"])


def test_the_picture_has_originals_above_reconstructions(train: Train, data: Path) -> None:
    folder = train("run", "--max_train_steps", 1, "--validation_data_dir", data / "held_out")
    picture = np.asarray(Image.open(folder / "reconstructions.png"))
    assert picture.shape == (16, 16 * 8, 3)
    model: Any = ViTVQModel.from_pretrained(folder)
    for index, path in enumerate(sorted((data / "held_out").glob("*.png"))):
        original = np.asarray(Image.open(path).convert("RGB"))
        column = slice(8 * index, 8 * index + 8)
        assert np.array_equal(picture[:8, column], original)
        pixels = torch.from_numpy(original.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        shown = (model(pixels).sample[0].clamp(-1, 1).permute(1, 2, 0) + 1) * 127.5
        assert np.abs(picture[8:, column] - shown.detach().numpy()).max() <= 0.51
    assert (picture[:, 5 * 8 :] == 0).all()


def test_its_own_flags_are_in_the_record(train: Train) -> None:
    folder = train("run", "--max_train_steps", 1, "--r1_gamma", 5, "--latent_scale", "std")
    (session,) = json.loads((folder / "run.json").read_text())["sessions"]
    told = session["arguments"]
    assert (told["r1_gamma"], told["latent_scale"], told["l2_weight"]) == (5.0, "std", 1.0)
    assert "patch_size=4" in told["model_args"]
    assert told["cache_dir"].endswith("cache")


def test_codebook_and_losses_are_logged(
    train: Train, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[int, dict[str, Any]] = {}

    def note(self: Any, values: dict[str, Any], step: int, **kwargs: Any) -> None:
        logged.setdefault(step, {}).update(values)

    monkeypatch.setattr("accelerate.Accelerator.log", note)
    train(
        "run",
        "--max_train_steps",
        6,
        "--log_every",
        2,
        "--codebook_patience",
        1,
        "--validation_data_dir",
        data / "held_out",
        "--validation_steps",
        4,
    )
    assert sorted(logged) == [2, 4, 6]
    wanted = {"codebook/used", "codebook/perplexity", "codebook/revived", "lr"}
    losses = ("loss", "l2", "codebook", "adversarial", "discriminator")
    for values in logged.values():
        assert wanted | {f"train/{name}" for name in losses} <= values.keys()
        assert 0 < values["codebook/used"] <= 1
        parts = [values[f"train/{name}"] for name in ("l2", "codebook", "adversarial")]
        assert values["train/loss"] == pytest.approx(parts[0] + parts[1] + 0.1 * parts[2], rel=1e-5)
    # 2 images of 4 tokens use at most 8 of 32 codes: all others are revived at each step
    assert logged[2]["codebook/revived"] >= 2 * 24
    assert "validation/psnr" in logged[4]
    assert "validation/psnr" not in logged[2] | logged[6]


def test_a_perceptual_loss_trains(train: Train, tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    settings = ("--max_train_steps", 2, "--adversarial_weight", 0)
    files = [
        load_file(train(name, *settings, *more) / "diffusion_pytorch_model.safetensors")
        for name, more in {"with": ("--perceptual_model", tmp_path / "dino"), "without": ()}.items()
    ]
    assert not torch.equal(files[0]["to_patch.weight"], files[1]["to_patch.weight"])


def test_training_goes_on_from_a_saved_model(
    train: Train, script: ModuleType, data: Path, tmp_path: Path
) -> None:
    first = train("first", "--max_train_steps", 2)
    given = argv(data, tmp_path / "second", "--max_train_steps", 1, "--learning_rate", 0)
    cut = given.index("--model_args")
    reset_accelerate()
    script.main(
        [
            *given[:cut],
            *given[cut + 1 + len(MODEL) :],
            *("--pretrained_model_name_or_path", str(first), "--codebook_patience", "0"),
        ]
    )
    file = "diffusion_pytorch_model.safetensors"
    before, after = load_file(first / file), load_file(tmp_path / "second" / file)
    for name in before.keys() - {"quantise.idle", "quantise.counts"}:
        assert torch.equal(before[name], after[name]), name


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model_args", "size=3"], "no argument 'size'"),
        (["--model_args", "image_size=16"], "--resolution is 8, but the model takes 3 x 16 x 16"),
        (["--model_args", "encoder_heads=3", "patch_size=4"], "heads"),
        (["--model_config", "huge"], "--model_config is 'huge': it is none of small, base, large"),
        (["--pretrained_model_name_or_path", "x"], "--model_args .*without a fresh"),
        (["--r1_interval", "0"], "--r1_interval is 0: it must be at least 1"),
        (["--l2_weight", "nan"], "--l2_weight is nan"),
        (["--l2_weight", "0"], "nothing is reconstructed"),
        (["--perceptual_weight", "0.3"], "is 0.3, .* without --perceptual_model"),
        (["--perceptual_model", "/nowhere/at/all"], "--perceptual_model: .*cannot be loaded"),
        (
            ["--adversarial_weight", "0", "--discriminator_start", "9"],
            "is 9, .*without an --adversarial",
        ),
        (["--validation_steps", "3"], "is 3, .*without --validation_split or"),
        (["--validation_data_dir", "/nowhere/at/all"], "/nowhere/at/all: there is no such folder"),
        (["--lr_scheduler", "sinus"], "--lr_scheduler is 'sinus'"),
        (["--report_to", "pigeon"], "--report_to is 'pigeon'"),
        (["--resume_from_checkpoint", "checkpoint-9"], "there is no folder"),
    ],
)
def test_wrong_invocations(
    script: ModuleType, data: Path, tmp_path: Path, more: list[str], told: str
) -> None:
    reset_accelerate()
    with pytest.raises(UsageError, match=told):
        script.main(argv(data, tmp_path / "run", "--max_train_steps", 1, *more))


def test_held_out_images_are_looked_at_too(
    script: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_images(tmp_path / "held_out", 4)
    (held_out / "02.png").write_bytes(b"broken")
    more = ["--max_train_steps", 1, "--validation_data_dir", held_out]
    reset_accelerate()
    with pytest.raises(UsageError, match=r"1 of 4 samples(.|\n)*02\.png.*cannot identify"):
        script.main(argv(data, tmp_path / "run", *more))
    reset_accelerate()
    skip = ("--bad_samples", "skip", "--bad_samples_limit", 0.5)
    script.main(argv(data, tmp_path / "run", *more, *skip))
    told = json.loads((tmp_path / "run" / "skipped_held_out.jsonl").read_text())
    assert told["row"] == 2
    assert not (tmp_path / "run" / "skipped_samples.jsonl").exists()


def test_a_resolution_that_the_critic_cannot_halve(
    script: ModuleType, data: Path, tmp_path: Path
) -> None:
    reset_accelerate()
    more = ("--resolution", 36, "--max_train_steps", 1)
    with pytest.raises(UsageError, match=r"resolution of 36.*--adversarial_weight 0"):
        script.main(argv(data, tmp_path / "run", *more))


# -- the digits ------------------------------------------------------------------------------------


def digits_argv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: object) -> list[str]:
    """The command of the examples' README, with changes."""
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "text_to_image"))
    digits = importlib.import_module("digits")
    digits.export_by_class(tmp_path / "digits" / "train", 32)
    digits.export_by_class(tmp_path / "digits" / "held_out", 32, held_out=True)
    text = (EXAMPLES / "README.md").read_text("utf-8")
    command = (
        text.split("launch examples/autoencoder/train_vit_vqgan.py", 1)[1]
        .split("```")[0]
        .replace("\\\n", " ")
        .split()
    )
    words = [str(tmp_path / word) if word.startswith("digits/") else word for word in command]
    words[words.index("--output_dir") + 1] = str(tmp_path / "run")
    return [*words, "--cache_dir", str(tmp_path / "cache"), *map(str, more)]


def test_digits_are_learned(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A twentieth of the README's run: far above what a constant picture reaches, 7 dB."""
    reset_accelerate()
    shorter = ("--max_train_steps", 50, "--train_batch_size", 16, "--lr_warmup_steps", 5)
    script.main(digits_argv(monkeypatch, tmp_path, *shorter, "--codebook_patience", 5))
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert told["held_out"]["psnr_of_mean_error"] > 14
    assert told["held_out"]["codebook_used"] >= 0.5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_readmes_run_reaches_its_bar(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reset_accelerate()
    script.main(digits_argv(monkeypatch, tmp_path))
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out"]
    assert told["images"] == 297
    assert told["psnr_of_mean_error"] >= 22
    assert told["codebook_used"] >= 0.5
