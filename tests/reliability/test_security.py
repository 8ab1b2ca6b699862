"""What SECURITY.md promises: nothing loaded runs, no token is written, paths are literal."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle  # noqa: TID251 - to write what must never be read
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi
from safetensors.torch import load_file

from diffusers_curriculum import TimestepSampler
from diffusers_curriculum.models.loading import load_pipeline
from diffusers_curriculum.training.arguments.environment import satisfied
from diffusers_curriculum.training.errors import HubError, UsageError
from diffusers_curriculum.training.parts.families.base import ModelFamily, families
from diffusers_curriculum.training.process import hub_client
from diffusers_curriculum.training.process.foreign_code import refuse_foreign_code
from diffusers_curriculum.training.publish import hub
from diffusers_curriculum.training.storage.manifest import read_manifest, write_manifest
from tests.scripts.small_runs import Bench, hashes, make_bench, reset_accelerate, status, train
from tests.training.command_lines import parse_args
from tests.training.fake_hub import FakeHub, reachable, serve

pytestmark = pytest.mark.reliability
GIVEN, FROM_ENVIRONMENT = "hf_GivenOnTheCommandLine", "hf_TakenFromTheEnvironment"
TOKENS = (GIVEN, FROM_ENVIRONMENT)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def run(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with an average and a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("run")
    train(bench.argv(folder, *RUN, "--max_train_steps", 2, "--checkpointing_steps", 2))
    reset_accelerate()
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


RUN = (
    "--use_ema",
    "--timestep_sampler",
    "laplace",
    "--curriculum",
    "difficulty",
    "--curriculum_clusters",
    3,
    "--curriculum_patience",
    1,
    "--curriculum_max_share",
    10**9,
)
RESUME = (*RUN, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")


# -- R15: no pickle --------------------------------------------------------------------------------


class Poison:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


PICKLES = (
    "random_states_0.pkl",
    "optimizer.bin",
    "scheduler.bin",
    "sampler.pkl",
    "scaler.pt",
    "custom_checkpoint_0.pkl",
    "pytorch_model.bin",
    "training_state.pt",
    "unet/diffusion_pytorch_model.bin",
    "unet_ema/diffusion_pytorch_model.bin",
    "unet/pytorch_model.bin",
)
MODULES = ("sampler.py", "unet/diffusers.py", "unet/modeling.py", "__init__.py")


def poison(file: Path, canary: Path) -> None:
    """Write what runs when it is unpickled, or imported, in the format that the name suggests."""
    if file.suffix == ".py":
        file.write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    elif file.suffix in (".bin", ".pt"):
        torch.save(Poison(canary), file)
    else:
        file.write_bytes(pickle.dumps(Poison(canary)))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something is being unpickled")

    for owner, names in (
        (pickle, ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler")),
        (torch, ("load",)),
        (torch.serialization, ("load",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)


@pytest.mark.parametrize("name", ["optimizer.bin", "x.pkl", "x.py"])
def test_the_poison_works(tmp_path: Path, canary: Path, name: str) -> None:
    poison(tmp_path / name, canary)
    assert not canary.exists()
    if name.endswith(".py"):
        exec((tmp_path / name).read_text())
    elif name.endswith(".bin"):
        torch.load(tmp_path / name, weights_only=False)  # noqa: TID251
    else:
        pickle.loads((tmp_path / name).read_bytes())
    assert canary.exists()


@pytest.mark.parametrize("listed", [False, True])
def test_resume_executes_no_pickle(
    bench: Bench, run: Path, tmp_path: Path, canary: Path, no_unpickling: None, listed: bool
) -> None:
    outputs = []
    for name, poisoned in (("clean", False), ("poisoned", True)):
        folder = Path(shutil.copytree(run / "checkpoint-2", tmp_path / name / "checkpoint-2"))
        for file in (*PICKLES, *MODULES) if poisoned else ():
            poison(folder / file, canary)
        if poisoned and listed:  # as one who can forge the manifest would
            write_manifest(folder, 2, read_manifest(folder)["facts"])
        record = train(bench.argv(folder.parent, *RESUME, "--checkpointing_steps", 4))
        outputs.append((record.steps, hashes(folder.parent / "checkpoint-4")))
    assert [step.step for step in outputs[0][0]] == [2, 3]
    assert outputs[0] == outputs[1]
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    ["optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors", "training_state.json"],
)
def test_a_pickle_under_a_trusted_name_is_refused(
    bench: Bench,
    run: Path,
    tmp_path: Path,
    canary: Path,
    no_unpickling: None,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(run / "checkpoint-2", tmp_path / "out" / "checkpoint-2"))
    (folder / name).write_bytes(pickle.dumps(Poison(canary)))
    write_manifest(folder, 2, read_manifest(folder)["facts"])
    assert status(bench.argv(folder.parent, *RESUME)) == 2
    assert Path(name).name in capsys.readouterr().err
    assert not canary.exists()


SCHEDULER = {"_class_name": "DDPMScheduler"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"_class_name": "os.system", "scheduler": SCHEDULER}, "os.system"),
        ({"_class_name": "sampler.Evil", "scheduler": SCHEDULER}, "sampler.Evil"),
        ({"_class_name": "__init__", "scheduler": SCHEDULER}, "__init__"),
        (
            {"_class_name": "DensityTimestepSampler", "scheduler": {"_class_name": "UNet2DModel"}},
            "scheduler class 'UNet2DModel'",
        ),
        (
            {"_class_name": "DensityTimestepSampler", "scheduler": {"_class_name": "sampler.Evil"}},
            "sampler.Evil",
        ),
        (
            {
                "_class_name": "DensityTimestepSampler",
                "scheduler": SCHEDULER,
                "density": "__import__('os').mkdir('canary')",
            },
            "__import__",
        ),
        ({"_class_name": "DensityTimestepSampler", "scheduler": SCHEDULER, "code": "x"}, "code"),
    ],
)
def test_a_sampler_config_runs_nothing(
    tmp_path: Path, canary: Path, no_unpickling: None, monkeypatch: Any, config: Any, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("sampler.py", "__init__.py", "x.pkl"):
        poison(tmp_path / name, canary)
    (tmp_path / "timestep_sampler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(told)):
        TimestepSampler.from_pretrained(str(tmp_path))
    assert not canary.exists()


def test_a_sampler_config_is_loaded_from_a_poisoned_folder(
    run: Path, tmp_path: Path, canary: Path, no_unpickling: None
) -> None:
    shutil.copy(run / "timestep_sampler" / "timestep_sampler_config.json", tmp_path)
    for name in ("sampler.py", "__init__.py", "sampler.pkl", "timestep_sampler.bin"):
        poison(tmp_path / name, canary)
    loaded = TimestepSampler.from_pretrained(str(tmp_path))
    original = TimestepSampler.from_pretrained(str(run))
    assert torch.equal(loaded.probabilities(0), original.probabilities(0))
    assert not canary.exists()


# -- R22: tokens -----------------------------------------------------------------------------------


def spellings(token: str) -> list[bytes]:
    """A token as it is, in base64 at each offset, in hexadecimal, and as UTF-16."""
    plain = token.encode()
    encoded = [base64.b64encode(b" " * i + plain)[4:-4] for i in range(3)]
    return [plain, *encoded, plain.hex().encode(), token.encode("utf-16-le")]


def places(tokens: tuple[str, ...], *roots: Path) -> list[str]:
    """Every file below some folders that has a token in its content or its name."""
    needles = [needle for token in tokens for needle in spellings(token)]
    files = [file for root in roots for file in root.rglob("*") if file.is_file()]
    return [
        str(file)
        for file in files
        if any(needle in file.read_bytes() + str(file).encode() for needle in needles)
    ]


def test_the_search_finds_a_token(tmp_path: Path) -> None:
    texts = [b"a " + GIVEN.encode() + b" z", base64.b64encode(b"user:" + GIVEN.encode() + b"!")]
    for number, text in enumerate([*texts, b"nothing"]):
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / str(number)).write_bytes(b"\x00" * 99 + text)
    assert [Path(place).name for place in sorted(places(TOKENS, tmp_path))] == ["0", "1"]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve() as server, reachable(server, xet=False):
        monkeypatch.setattr(hub_client, "HfApi", lambda token=None: HfApi(server.url, token=token))
        yield server


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
@pytest.mark.parametrize("given", [True, False])
def test_secret_never_written(
    bench: Bench,
    tmp_path: Path,
    fake_hub: FakeHub,
    monkeypatch: Any,
    capfd: Any,
    caplog: Any,
    given: bool,
) -> None:
    monkeypatch.setenv("HF_TOKEN", FROM_ENVIRONMENT)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "somebody-digits"
    trackers = "tensorboard" if given else "all"  # some tell the command line, and are refused
    more = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--report_to", trackers)
    argv = bench.argv(
        out, *RUN, *more, "--log_every", 1, "--push_to_hub", "--validation_prompts", "a picture"
    )
    caplog.set_level(logging.DEBUG)
    train([*argv, "--hub_token", GIVEN] if given else argv, pictures=given)

    sent = {request.headers.get("authorization") for request in fake_hub.requests}
    assert f"Bearer {GIVEN if given else FROM_ENVIRONMENT}" in sent  # it was really in use
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any("tfevents" in file.name for file in written)
    assert any(file.name == "hparams.yml" for file in written)
    assert any(file.name == "manifest.json" for file in written)
    assert places(TOKENS, tmp_path, bench.cache, bench.pipeline) == []
    said = "".join(capfd.readouterr()) + caplog.text
    assert [token for token in TOKENS if token in said] == []
    uploaded = json.dumps(fake_hub.arrived(), default=repr)
    assert [token for token in TOKENS if token in uploaded] == []


MISTAKES = {
    "a wrong argument": ("--learning_rate", -1, "--hub_token", GIVEN),
    "an unknown argument": ("--no_such_flag", "--hub_token", GIVEN),
    "a misspelt flag": ("--hub-token", GIVEN),
    "a flag of another program": (f"--token={GIVEN}",),
    "a token as another value": ("--hub_token", GIVEN, "--mixed_precision", GIVEN),
    "wandb": ("--report_to", "wandb", "--hub_token", GIVEN),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_does_not_print_the_token(
    bench: Bench, tmp_path: Path, mistake: str, capfd: Any
) -> None:
    assert status(bench.argv(tmp_path, *RUN, *MISTAKES[mistake])) == 2
    err = capfd.readouterr().err
    assert "error" in err
    assert GIVEN not in err


@pytest.mark.parametrize(
    "token",
    [
        f"{GIVEN}\n{GIVEN}",
        f"{GIVEN}\r\nX: y",
        pytest.param(
            f"{GIVEN}\x0b1",
            marks=pytest.mark.skipif(
                not satisfied("huggingface_hub>=1"), reason="older ones send it"
            ),
        ),
    ],
)
def test_a_token_that_the_client_refuses_is_not_quoted(
    fake_hub: FakeHub, tmp_path: Path, token: str
) -> None:
    """HTTP libraries quote the header that they do not accept."""
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(HubError) as refusal:
        hub.push(tmp_path, "somebody/x", token=token)
    assert GIVEN not in str(refusal.value)
    assert "Bearer" not in str(refusal.value) or "***" in str(refusal.value)
    assert refusal.value.__suppress_context__  # nor does a traceback show where it came from


@pytest.mark.parametrize("space", ["\n", "\r\n", " "])
def test_white_space_around_a_token_is_no_part_of_it(
    fake_hub: FakeHub, tmp_path: Path, space: str
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    hub.push(tmp_path, "somebody/x", token=f"{GIVEN}{space}")
    assert fake_hub.requests[-1].headers["authorization"] == f"Bearer {GIVEN}"


def test_a_refusal_of_the_hub_does_not_show_the_token(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.refuse = "commit"
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(HubError, match="403") as refusal:
        hub.push(tmp_path, "somebody/x", token=GIVEN)
    assert GIVEN not in str(refusal.value)


# -- R25: no remote code ---------------------------------------------------------------------------


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def _custom_component(model: Path, canary: Path) -> None:
    poison(model / "text_encoder" / "modeling_evil.py", canary)
    edit(model / "model_index.json", text_encoder=["modeling_evil", "CLIPTextModel"])


def _custom_pipeline(model: Path, canary: Path) -> None:
    poison(model / "pipeline_evil.py", canary)
    edit(model / "model_index.json", _class_name=["pipeline_evil", "Evil"])


def _module_named_like_a_library(model: Path, canary: Path) -> None:
    poison(model / "text_encoder" / "transformers.py", canary)


def _module_on_the_path(model: Path, canary: Path) -> None:
    poison(model.parent / "evil_on_the_path.py", canary)
    edit(model / "model_index.json", feature_extractor=["evil_on_the_path", "Evil"])


def _kernel(model: Path, canary: Path) -> None:
    edit(model / "text_encoder" / "config.json", attn_implementation="evil/kernel")


def _pickled_weights(model: Path, canary: Path) -> None:
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    poison(model / "vae" / "diffusion_pytorch_model.bin", canary)


ATTACKS: dict[Callable[[Path, Path], None], str] = {
    _custom_component: "text_encoder is a class of 'modeling_evil'",
    _custom_pipeline: "the pipeline is a module",
    _module_named_like_a_library: "text_encoder brings a module named transformers.py",
    _module_on_the_path: "feature_extractor is a class of 'evil_on_the_path'",
    _kernel: "text_encoder asks for the kernel 'evil/kernel'",
    _pickled_weights: "vae has its weights in a pickle only",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_remote_code(
    bench: Bench,
    tmp_path: Path,
    canary: Path,
    attack: Callable[[Path, Path], None],
    monkeypatch: Any,
    capsys: Any,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    model = Path(shutil.copytree(bench.pipeline, tmp_path / "model"))
    attack(model, canary)
    argv = bench.argv(tmp_path / "out", "--max_train_steps", 1)
    monkeypatch.setattr(ModelFamily, "load_part", lambda *a, **k: pytest.fail("a model was loaded"))
    assert status([*argv, "--pretrained_model_name_or_path", str(model)]) == 2
    assert ATTACKS[attack] in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_the_loaders_open_no_pickle_either(
    bench: Bench, tmp_path: Path, part: str, no_unpickling: None
) -> None:
    """Were the check at the start to miss it, as it may where the Hub does not answer."""
    model = Path(shutil.copytree(bench.pipeline, tmp_path / "model"))
    (weights,) = (model / part).glob("*.safetensors")
    harmless = "pytorch_model.bin" if part == "text_encoder" else f"{weights.stem}.bin"
    torch.save(load_file(weights), model / part / harmless)
    weights.unlink()
    line = [*bench.argv(tmp_path), "--pretrained_model_name_or_path", str(model)]
    args = parse_args(line)
    with pytest.raises(UsageError, match=f"its {part} cannot be loaded"):
        families()["sd"].load_components(args, {}, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="safetensors"):
        load_pipeline(StableDiffusionPipeline, model)


def test_modules_that_nothing_names_are_left_alone(
    bench: Bench, tmp_path: Path, canary: Path, no_unpickling: None
) -> None:
    """auto_map and modules in the folders of a sound model: it trains, and they do not run."""
    model = Path(shutil.copytree(bench.pipeline, tmp_path / "model"))
    for file in (
        "pipeline.py",
        "unet/modeling_evil.py",
        "tokenizer/tokenization_evil.py",
        "text_encoder/modeling_evil.py",
        "scheduler/scheduler.py",
        "unet/diffusion_pytorch_model.bin",
    ):
        poison(model / file, canary)
    auto_map = dict.fromkeys(("AutoModel", "AutoConfig", "AutoTokenizer"), "modeling_evil.Evil")
    for file in (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
    ):
        edit(model / file, auto_map=auto_map)
    argv = bench.argv(tmp_path / "out", "--max_train_steps", 1)
    train([*argv, "--pretrained_model_name_or_path", str(model)])
    assert (tmp_path / "out" / "model_index.json").exists()
    assert not canary.exists()


def test_what_official_pipelines_name_is_accepted(tmp_path: Path) -> None:
    edit(
        tmp_path / "model_index.json",
        _class_name="StableDiffusionPipeline",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=[None, None],
        requires_safety_checker=True,
    )
    refuse_foreign_code(str(tmp_path))


def test_no_flag_enables_remote_code() -> None:
    names = vars(parse_args(["--pretrained_model_name_or_path", "a/b", "--dataset_name", "c/d"]))
    assert not [name for name in names if "trust" in name or "custom_pipeline" in name]


# -- R14: the path to resume from ------------------------------------------------------------------


def snapshot(*roots: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below some folders."""
    found = [path for root in roots for path in [root, *root.rglob("*")]]
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in found}


@pytest.mark.parametrize("form", ["absolute", "dotted", "symlink", "relative"])
def test_resume_path_is_literal(
    bench: Bench, run: Path, tmp_path: Path, form: str, monkeypatch: Any, caplog: Any
) -> None:
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    request = {
        "absolute": str(run / "checkpoint-2"),
        "dotted": str(tmp_path / "inner" / ".." / "other" / "checkpoint-2"),
        "symlink": str(tmp_path / "link" / "checkpoint-2"),
        "relative": os.path.join("inner", "..", "other", "checkpoint-2"),
    }[form]
    source = (run if form in ("absolute", "symlink") else other) / "checkpoint-2"
    before = snapshot(run, other, bench.images, bench.pipeline)
    argv = bench.argv(tmp_path / "out", *RUN, "--max_train_steps", 3)
    with caplog.at_level(logging.INFO):
        record = train([*argv, "--resume_from_checkpoint", request])
    assert record.numbers == [2]
    assert f"Resuming from {source.resolve()}." in caplog.text
    assert snapshot(run, other, bench.images, bench.pipeline) == before
    assert set(os.listdir(tmp_path)) == {"link", "inner", "other", "out"}


def test_a_bare_name_means_the_output_folder(
    bench: Bench, run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(run / "checkpoint-2", out / "checkpoint-2")
    decoy = tmp_path / "checkpoint-2"  # in the working folder, and not what is meant
    decoy.mkdir()
    monkeypatch.chdir(tmp_path)
    more = ("--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-2")
    assert train(bench.argv(out, *RUN, *more)).numbers == [2]
    assert list(decoy.iterdir()) == []


@pytest.mark.parametrize(
    "request_", ["checkpoint-9", "{tmp}/x/../none/checkpoint-2", "../checkpoint-2"]
)
def test_a_missing_checkpoint_ends_at_once(
    bench: Bench, run: Path, tmp_path: Path, request_: str, monkeypatch: Any, capsys: Any
) -> None:
    out = Path(shutil.copytree(run, tmp_path / "out"))
    monkeypatch.chdir(out)
    loaded: list[str] = []
    for name in ("load_tokenizers", "load_components", "load_schedulers"):
        monkeypatch.setattr(ModelFamily, name, lambda *a, n=name: loaded.append(n))
    before, began = snapshot(tmp_path), time.process_time()
    asked = request_.format(tmp=tmp_path)
    more = ("--max_train_steps", 3, "--resume_from_checkpoint", asked)
    assert status(bench.argv(out, *RUN, *more)) == 2
    assert time.process_time() - began < 5
    err = capsys.readouterr().err
    assert asked in err
    resolved = Path(asked).resolve() if os.sep in asked else (out / asked).resolve()
    assert str(resolved) in err
    assert loaded == []
    assert snapshot(tmp_path) == before
