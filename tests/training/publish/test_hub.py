"""Model cards that no string can break, and pushes of which every byte is known."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from diffusers_curriculum.training.arguments.environment import repository_name
from diffusers_curriculum.training.errors import HubError
from diffusers_curriculum.training.process import hub_client
from diffusers_curriculum.training.publish import hub
from diffusers_curriculum.training.publish.card import plain, resolve_license
from diffusers_curriculum.training.publish.hub import (
    CardFacts,
    build_model_card,
    files_to_upload,
    prepare_repository,
    push,
    write_model_card,
)
from tests.training.fake_hub import FakeHub, serve

TOKEN = "hf_ThisIsTheSecretOfTheTest"
FACTS = CardFacts(
    repo_id="somebody/digits",
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    dataset_name="lambdalabs/naruto",
    prompts=("a handwritten seven", "a handwritten two"),
    image_grid="val_imgs_grid.png",
    training={
        "Optimizer steps": 1000,
        "Learning rate": 1e-4,
        "Batch size per process": 8,
        "Resolution": None,
    },
    sampler={"Density": "laplace(mu=0, b=0.5)", "Curriculum": "easy_to_hard, 20 clusters"},
    license="mit",
)
MARKDOWN = MarkdownIt("gfm-like")

NASTY = [
    "",
    "---\nlicense: evil\n---\n",
    "\n---\n# Title",
    "```\n<script>alert(1)</script>\n```",
    "~~~\nx\n~~~",
    "``````",
    "<img src=x onerror=alert(1)>",
    "<!-- comment",
    "[link](http://evil.example) ![i](x.png)",
    "http://evil.example www.evil.example a@evil.example <http://evil.example>",
    '"""); import os  # \\',
    "'\"\\`${x}{{ card_data }}{% raw %}",
    "\ud800 \u2028 \x00 \x85 \u202e",
    "* item\n1. one\n    code",
    "|a|b|\n|-|-|",
    "&lt;b&gt; &amp;",
    "x" * 5000,
]


def parts(card: Any) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card as the Hub reads it."""
    text = str(card)
    assert text.startswith("---\n")
    _, front, body = text.split("\n---\n", 1)[0], *text[4:].split("\n---\n", 1)
    return yaml.safe_load(front), body


def tokens(body: str) -> list[Token]:
    found = []
    for token in MARKDOWN.parse(body):
        found += [token, *(token.children or [])]
    return found


def kinds(body: str) -> set[str]:
    return {token.type for token in tokens(body)}


def usage(body: str) -> tuple[str, str]:
    """The repository and the prompt in the first code block of a card."""
    fence, *_ = [token for token in tokens(body) if token.type == "fence"]
    calls = [node for node in ast.walk(ast.parse(fence.content)) if isinstance(node, ast.Call)]
    given = {
        ast.unparse(call.func): [*call.args, *(word.value for word in call.keywords)][0]
        for call in calls
    }
    return tuple(  # type: ignore[return-value]
        ast.literal_eval(given[name]) for name in ("DiffusionPipeline.from_pretrained", "pipeline")
    )


def test_card_states_the_facts() -> None:
    front, body = parts(build_model_card(FACTS))
    assert front == {
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "datasets": "lambdalabs/naruto",
        "library_name": "diffusers",
        "license": "mit",
        "inference": True,
        "tags": ["diffusers", "diffusers-training"],
    }
    rendered = MARKDOWN.render(body)
    assert "Resolution" not in rendered
    for text in (
        "a handwritten seven",
        "a handwritten two",
        "Optimizer steps: 1000",
        "Learning rate: 0.0001",
        "Batch size per process: 8",
        "Density: laplace(mu=0, b=0.5)",
    ):
        assert text in rendered
    assert '<img src="./val_imgs_grid.png" alt="Samples"' in rendered
    assert usage(body) == ("somebody/digits", "a handwritten seven")


def test_plain_words_are_not_escaped() -> None:
    training = {"Learning rate": 1e-4, "Weighting": "min_snr (gamma=5.0), v_prediction - 3/4!"}
    sampler = {"Density": "laplace(mu=-1, b=0.5); floor: 10%"}
    facts = dataclasses.replace(
        FACTS, training=training, sampler=sampler, versions={"torch": "2.6"}
    )
    body = parts(build_model_card(facts))[1]
    for line in (
        "# Fine-tuned pipeline: somebody/digits",
        "* a handwritten seven",
        "* Learning rate: 0.0001",
        "* Weighting: min_snr (gamma=5.0), v_prediction - 3/4!",
        "* Density: laplace(mu=-1, b=0.5); floor: 10%",
        "* torch: 2.6",
    ):
        assert line in body.splitlines()
    assert "\\" not in body


@pytest.mark.parametrize("prompt", ["- a", "1. a", "12) a", "+ a", "= a", "---", "...", "2.5 a"])
def test_a_prompt_that_looks_like_a_list_stays_text(prompt: str) -> None:
    body = parts(build_model_card(dataclasses.replace(FACTS, prompts=(prompt,))))[1]
    found = tokens(body)
    assert [t.type for t in found].count("list_item_open") == 1 + 3 + 2
    texts = ["".join(c.content for c in t.children or []) for t in found if t.type == "inline"]
    assert prompt in texts


def test_all_pictures_are_shown() -> None:
    facts = dataclasses.replace(FACTS, pictures=("loss_per_noise_level.png", "other.png"))
    body = parts(build_model_card(facts))[1]
    shown = [str(t.attrs["src"]) for t in tokens(body) if t.type == "image"]
    assert shown == ["./val_imgs_grid.png", "./loss_per_noise_level.png", "./other.png"]
    with pytest.raises(HubError, match="not a plain file name"):
        build_model_card(dataclasses.replace(FACTS, pictures=("../x.png",)))


def test_card_without_prompts_dataset_or_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "jinja2"):
        monkeypatch.setitem(sys.modules, name, None)
    front, body = parts(build_model_card(CardFacts(repo_id="x", base_model="a/b")))
    assert "license" not in front
    assert "datasets" not in front
    assert "image" not in kinds(body)
    assert "a local data set" in MARKDOWN.render(body)
    assert "None" not in body
    assert usage(body) == ("x", "a prompt of yours")


@given(prompt=st.text(), base=st.text(), dataset=st.text(), value=st.text())
def test_no_string_breaks_the_card(prompt: str, base: str, dataset: str, value: str) -> None:
    check_card(prompt, base, dataset, value)


@pytest.mark.parametrize("text", NASTY)
def test_no_known_attack_breaks_the_card(text: str) -> None:
    check_card(text, text, text, text)
    check_card(f"a {text} b", text, text, text)


@given(st.lists(st.sampled_from(NASTY)).map("".join))
@example("<b>\n\n    <i>")
def test_no_mixture_of_attacks_breaks_the_card(text: str) -> None:
    check_card(text, text, text, text)


def check_card(prompt: str, base: str, dataset: str, value: str) -> None:
    """The card parses to the same structure as one of harmless words."""
    facts = dataclasses.replace(
        FACTS,
        repo_id=value,
        prompts=(prompt, prompt),
        base_model=base,
        dataset_name=dataset,
        sampler={value: value},
        training={value: value},
        flags={"validation_prompts": [value], "seed": 3},
    )
    card = build_model_card(facts)
    str(card).encode("utf-8")
    front, body = parts(card)
    assert set(front) <= {"base_model", "datasets", "library_name", "license", "inference", "tags"}
    assert front["license"] == "mit"
    assert front.get("base_model", base) == base
    assert front.get("datasets", dataset) == dataset
    plain_facts = dataclasses.replace(FACTS, flags={"validation_prompts": ["a"], "seed": 3})
    harmless = [token.type for token in tokens(parts(build_model_card(plain_facts))[1])]
    (flags,) = [token.content for token in tokens(body) if token.info == "yaml"]
    assert yaml.safe_load(flags) == {"validation_prompts": [value], "seed": 3}
    assert kinds(body) - {"softbreak", "text_special"} <= set(harmless)
    assert not {"html_block", "html_inline", "link_open"} & kinds(body)
    assert [t.type for t in tokens(body) if t.type in {"fence", "heading_open", "image"}] == [
        kind for kind in harmless if kind in {"fence", "heading_open", "image"}
    ]
    assert usage(body) == (value, prompt)
    assert body.count("```") == 2 * harmless.count("fence")
    assert "<" not in "".join(body.split("```")[::2])


@given(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1))
def test_plain_text_renders_as_itself(text: str) -> None:
    (inline,) = [t for t in MARKDOWN.parse(f"* x{plain(text)}") if t.type == "inline"]
    shown = "".join(child.content for child in inline.children or [])
    assert shown == f"x{text}"


def test_the_checks_see_a_broken_card() -> None:
    naive = "* <script>x</script>\n\n```\nfirst\n```\n\n```\nsecond\n```\n"
    assert {"html_inline"} <= kinds(naive) or "html_block" in kinds(naive)
    with pytest.raises(KeyError):
        usage(naive)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "a b", "../x", "a..b", "a\n", "-x", "/tmp/x", "a--b", "a.git\u00e9"]
)
def test_bad_repository_names_are_refused(name: str) -> None:
    client: Any = Client()
    with pytest.raises(HubError, match="--hub_model_id"):
        prepare_repository(dataclasses.replace(FACTS, repo_id=name), api=client)
    with pytest.raises(HubError, match="--hub_model_id"):
        push(Path(), name, api=client)


def test_bad_licence_and_picture_are_refused() -> None:
    with pytest.raises(HubError, match="'My Licence' is not an identifier"):
        build_model_card(dataclasses.replace(FACTS, license="My Licence"))
    with pytest.raises(HubError, match="not a plain file name"):
        build_model_card(dataclasses.replace(FACTS, image_grid="../x.png"))


def base_pipeline(folder: Path, card: str) -> str:
    folder.mkdir()
    (folder / "README.md").write_text(card)
    return str(folder)


def test_licence_of_a_local_base_wins(tmp_path: Path) -> None:
    base = base_pipeline(tmp_path / "base", "---\nlicense: openrail\n---\n")
    assert resolve_license(base, "mit") == "mit"
    assert resolve_license(base) == "openrail"
    silent = base_pipeline(tmp_path / "silent", "no front matter")
    assert resolve_license(silent, "mit") == "mit"
    assert resolve_license(silent) is None
    broken = base_pipeline(tmp_path / "broken", "---\nlicense: ['a\n---\n")
    assert resolve_license(broken, "mit") == "mit"


def test_a_local_base_shows_its_name_and_not_its_path(tmp_path: Path) -> None:
    base = base_pipeline(tmp_path / "mybase", "")
    card = build_model_card(dataclasses.replace(FACTS, base_model=base))
    assert "mybase" in str(card)
    assert str(tmp_path) not in str(card)
    assert "base_model" not in parts(card)[0]


# -- what leaves the machine -----------------------------------------------------------------------

WANTED = {
    "README.md": b"---\nlicense: mit\n---\n",
    "model_index.json": json.dumps(
        {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDPMScheduler"],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
            "logs": False,
            "..": ["os", "path"],
        }
    ).encode(),
    "timestep_sampler/timestep_sampler_config.json": b"{}",
    "timestep_sampler/timestep_sampler_state.safetensors": b"state",
    "val_imgs_grid.png": b"picture",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"weights",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"a b",
    "tokenizer/special_tokens_map.json": b"{}",
    "tokenizer/tokenizer_config.json": b"{}",
    "tokenizer/tokenizer.json": b"{}",
}
UNWANTED = {
    "run.json": b"token?",
    "args.json": b"{}",
    "losses.jsonl": b"{}",
    ".env": b"HF_TOKEN=x",
    "run.yaml": b"train_data_dir: private",
    "timestep_sampler/notes.json": b"x",
    ".hidden.png": b"x",
    "logs/text2image-fine-tune/events.out.tfevents.1": b"x",
    "logs/picture.png": b"x",
    "checkpoint-2/unet/config.json": b"{}",
    "checkpoint-2/unet/diffusion_pytorch_model.safetensors": b"old",
    "checkpoint-2/manifest.json": b"{}",
    ".tmp-checkpoint-4/unet/diffusion_pytorch_model.safetensors": b"half",
    "unet/.tmp-x.safetensors": b"half",
    "unet/optimizer.bin": b"x",
    "unet/notes.txt": b"x",
    "unet/deep/config.json": b"{}",
    "safety_checker/config.json": b"{}",
    "wandb/run/files/config.yaml": b"x",
    "__pycache__/x.pyc": b"x",
}


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    for name, content in (WANTED | UNWANTED).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"private")
    (folder / "link.png").symlink_to(secret)
    (folder / "folder.png").mkdir()
    (tmp_path / "config.json").write_bytes(b"{}")  # what the component named ".." points at
    return folder


def test_only_known_files_are_chosen(output_dir: Path) -> None:
    assert files_to_upload(output_dir) == sorted(WANTED)


def test_a_linked_component_is_left_out(output_dir: Path, tmp_path: Path) -> None:
    (output_dir / "unet").rename(tmp_path / "elsewhere")
    (output_dir / "unet").symlink_to(tmp_path / "elsewhere")
    chosen = files_to_upload(output_dir)
    assert [name for name in chosen if name.startswith("unet")] == []


def test_lora_weights_are_enough_and_nothing_is_not(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="holds no pipeline"):
        files_to_upload(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    assert files_to_upload(tmp_path) == ["pytorch_lora_weights.safetensors"]


def test_card_is_written_into_the_folder(tmp_path: Path) -> None:
    path = write_model_card(FACTS, tmp_path)
    assert path == tmp_path / "README.md"
    assert path.read_text("utf-8") == str(build_model_card(FACTS))


@pytest.mark.parametrize(("given_name", "expected"), [(None, "output"), ("me/mine", "me/mine")])
def test_repository_is_named_after_the_folder(given_name: str | None, expected: str) -> None:
    assert repository_name(given_name, "runs/output/") == expected


PROGRAM = """
import logging, os, sys
from diffusers_curriculum.training.publish.hub import CardFacts, prepare_repository
from diffusers_curriculum.training.publish.hub import push, write_model_card
from dataclasses import replace
logging.basicConfig(level=logging.DEBUG)
folder, token = sys.argv[1], os.environ.pop("SECRET")
facts = CardFacts(repo_id="digits", base_model=folder, prompts=("a",), license="mit")
repo_id = prepare_repository(facts, token=token)
write_model_card(replace(facts, repo_id=repo_id), folder)
print("PUSHED", repo_id, push(folder, repo_id, token=token))
"""


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    with serve() as running:
        yield running


def run_program(url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Push from a process of its own: the client reads its settings once, when it is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder.parent / "home"),
        "SECRET": TOKEN,
        "PYTHONPATH": str(Path(hub.__file__).parents[3]),
    }
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def everything_under(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_push_sends_exactly_the_pipeline_and_no_secret(
    fake_hub: FakeHub, output_dir: Path, tmp_path: Path
) -> None:
    done = run_program(fake_hub.url, output_dir)
    assert done.returncode == 0, done.stderr
    assert "PUSHED somebody/digits" in done.stdout

    (commit,) = fake_hub.commits
    assert commit["summary"] == "End of training"
    arrived = fake_hub.arrived()
    assert set(arrived) == set(WANTED)
    assert arrived == {name: (output_dir / name).read_bytes() for name in WANTED}
    assert b"somebody/digits" in arrived["README.md"]

    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN.encode() not in everything_under(tmp_path)
    authorised = 0
    for request in fake_hub.requests:
        authorised += request.headers.pop("authorization", None) == f"Bearer {TOKEN}"
        rest = json.dumps([request.path, request.headers]).encode() + request.body
        assert TOKEN.encode() not in rest, request.path
    assert authorised >= 4
    assert fake_hub.requests[0].path == "/api/repos/create"


@pytest.mark.parametrize(
    ("refused", "message"),
    [("/api/repos/create", "could not be created"), ("/commit/", "upload it again")],
)
def test_a_refusing_hub_gives_a_readable_error(
    fake_hub: FakeHub, output_dir: Path, refused: str, message: str
) -> None:
    fake_hub.refuse = refused
    done = run_program(fake_hub.url, output_dir)
    assert done.returncode != 0
    assert f"HubError: {'repository' if 'create' in refused else 'upload'}" in done.stderr
    assert message in done.stderr
    assert TOKEN not in done.stdout + done.stderr


class Client:
    """Stands for HfApi where nothing may go out."""

    token = TOKEN

    def create_repo(self, *args: Any, **kwargs: Any) -> Any:
        raise OfflineModeIsEnabled("offline mode is enabled\nrequest details")

    create_commit = create_repo


def test_offline_is_told_before_training(output_dir: Path) -> None:
    client: Any = Client()
    with pytest.raises(HubError, match=r"'somebody/digits' could not .*offline mode is enabled\)"):
        prepare_repository(FACTS, api=client)
    with pytest.raises(HubError, match=r"'a/b' failed .*pipeline is whole in"):
        push(output_dir, "a/b", api=client)


class Uploader(Client):
    """Fails as the client does: it tells which file, and the error behind it tells why."""

    def create_commit(self, *args: Any, **kwargs: Any) -> Any:
        try:
            raise OSError(f"disk of {TOKEN}\nmore")
        except OSError as error:
            raise RuntimeError("Error while uploading 'a'") from error


def test_the_reason_behind_a_failed_upload_is_told(output_dir: Path) -> None:
    client: Any = Uploader()
    told = r"\(RuntimeError: Error while uploading 'a' from OSError: disk of \*\*\*\)"
    with pytest.raises(HubError, match=told) as caught:
        push(output_dir, "a/b", api=client)
    assert caught.value.__suppress_context__


def test_a_bad_card_creates_no_repository() -> None:
    client: Any = Client()
    with pytest.raises(HubError, match="is not an identifier"):
        prepare_repository(dataclasses.replace(FACTS, license="?"), api=client)


def test_no_token_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "get_token", lambda: None)
    with pytest.raises(HubError, match="hf auth login"):
        prepare_repository(FACTS)
    monkeypatch.setattr(hub_client, "get_token", lambda: TOKEN)
    with pytest.raises(HubError, match="could not be created"):
        prepare_repository(FACTS, api=HfApi(endpoint="http://127.0.0.1:9"))
