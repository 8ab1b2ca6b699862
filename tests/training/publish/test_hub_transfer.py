"""A push and what comes back: over connections that break off, to a Hub that is busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_curriculum.samplers import LossSecondMomentTimestepSampler
from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint
from diffusers_curriculum.training.errors import UsageError
from tests.training.command_lines import parse_args
from tests.training.fake_hub import FakeHub, serve

TOKEN = "hf_ThisIsTheSecretOfTheTest"
ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from pathlib import Path
from diffusers_curriculum import TimestepSampler
from diffusers_curriculum.training.checkpoint.remote import fetch_checkpoint
from diffusers_curriculum.training.errors import HubError, UsageError
from diffusers_curriculum.training.publish.hub import CardFacts, prepare_repository, push

run, token = Path(sys.argv[1]), sys.argv[2]
prepare_repository(CardFacts(repo_id="x"), token=token)
for _ in range(2):
    push(run, "somebody/x", checkpoint=run / "checkpoint-2", token=token)
print(fetch_checkpoint(run.parent / "again", "hub:somebody/x", token))
try:
    fetch_checkpoint(run.parent / "again", "hub:somebody/x", token)
except UsageError as error:
    print(error)
sampler = TimestepSampler.from_pretrained("somebody/x", token=token)
sampler.save_pretrained(str(run.parent / "law"))
print(sampler.push_to_hub("law", token=token))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve() as running:
        running.token = TOKEN
        yield running


def run_program(hub: FakeHub, folder: Path, token: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HOME": str(folder.parent / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(folder), token]
    return subprocess.run(
        command,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def finished(folder: Path) -> LossSecondMomentTimestepSampler:
    """What a run leaves, with a law that has learned."""
    (folder / "again").mkdir(parents=True)
    run = folder / "run"
    sampler = LossSecondMomentTimestepSampler(
        DDPMScheduler(), bins=4, refresh_every=2, warm_up=0, min_observations=1
    )
    for step in range(8):
        drawn = sampler.sample(64, step=step).indices
        sampler.observe(drawn, drawn / 1000 + 0.1, step)
    save_checkpoint(run, 2, lambda to: (to / "weights.json").write_text("{}"), {"seed": 1})
    (run / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    sampler.save_pretrained(str(run / "timestep_sampler"))
    return sampler


def test_what_is_pushed_comes_back_over_a_bad_line(hub: FakeHub, tmp_path: Path) -> None:
    sampler = finished(tmp_path)
    hub.busy.update({"/preupload/": 1, "/commit/": 1, "last-checkpoint/weights.json": 1})
    hub.dropped.update({"/storage/": 1})
    done = run_program(hub, tmp_path / "run", TOKEN)
    assert done.returncode == 0, done.stderr

    first = hub.commits[0]
    law = "timestep_sampler/timestep_sampler_"
    checkpoint = {"last-checkpoint/manifest.json", "last-checkpoint/weights.json"}
    assert first["files"].keys() == {
        "model_index.json",
        f"{law}config.json",
        f"{law}state.safetensors",
        *checkpoint,
    }
    assert first["summary"] == "Step 2"
    assert hub.asked("/storage/") == 1  # once, though two pushes hold it
    assert not +hub.busy  # all of these were asked for again
    assert not +hub.dropped

    again = tmp_path / "again" / "checkpoint-2"
    assert str(again) in done.stdout
    kept = tmp_path / "run" / "checkpoint-2"
    names = sorted(path.name for path in kept.iterdir())
    assert [path.read_bytes() for path in sorted(again.iterdir())] == [
        (kept / name).read_bytes() for name in names
    ]
    assert "holds checkpoint-2 already: go on with it by" in done.stdout

    loaded = LossSecondMomentTimestepSampler.from_pretrained(str(tmp_path / "law"))
    torch.testing.assert_close(loaded.probabilities(9), sampler.probabilities(9), rtol=0, atol=0)
    assert not torch.equal(loaded.probabilities(9), torch.full((1000,), 1e-3).double())
    assert {f"{Path(law).name}config.json", f"{Path(law).name}state.safetensors"} <= {
        *hub.arrived()
    }
    assert json.loads(hub.arrived()[f"{Path(law).name}config.json"])["bins"] == 4


def test_a_wrong_token_is_told_before_training(hub: FakeHub, tmp_path: Path) -> None:
    finished(tmp_path)
    done = run_program(hub, tmp_path / "run", "hf_another")
    assert done.returncode == 1
    assert "HubError: repository 'x' could not be created" in done.stderr
    assert "401" in done.stderr
    assert "hf_another" not in done.stderr
    assert hub.commits == []


@pytest.mark.parametrize("name", ["hub:", "hub:a/b/c", "hub:a b@main"])
def test_a_checkpoint_of_no_repository_is_refused(name: str, tmp_path: Path) -> None:
    words = ("--pretrained_model_name_or_path", "a/b", "--dataset_name", "c", "--output_dir")
    with pytest.raises(UsageError, match="give --resume_from_checkpoint as hub:NAME or"):
        parse_args([*words, str(tmp_path), "--resume_from_checkpoint", name])
    parse_args([*words, str(tmp_path), "--resume_from_checkpoint", "hub:a/b@main"])
