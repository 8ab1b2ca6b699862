"""What only data, a config or a model can tell is told before step 0, in one line with the value;
counts of steps cost nothing, however large."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffusers_curriculum.training.arguments.flag import LARGEST
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.loop import job
from tests.scripts.every_script import FIXTURES, SCRIPTS, Reached, Script, after_update
from tests.training.levels.test_absurd_numbers import little_memory, task_of

DIT, UNET = ("class_conditional", "dit.json"), ("unconditional", "unet.json")
# script and config file, what is put there; what is told
CONFIGS: tuple[tuple[tuple[str, str], dict[str, Any], str], ...] = (
    (DIT, {"num_layers": 0}, "num_layers=0 must be a whole number from 1 to 1024"),
    (DIT, {"num_layers": 10**9}, "num_layers=1000000000 must be"),
    (DIT, {"num_attention_heads": 0}, "num_attention_heads=0 must be"),
    (DIT, {"attention_head_dim": -4}, "attention_head_dim=-4 must be"),
    (DIT, {"patch_size": 0}, "patch_size=0 must be"),
    (DIT, {"norm_eps": "a"}, "norm_eps='a' is not a finite number"),
    (DIT, {"activation_fn": "nope"}, "its config cannot be built (UnboundLocalError: "),
    (DIT, {"norm_type": "layer_norm"}, "its config cannot be built (NotImplementedError: "),
    (DIT, {"num_embeds_ada_norm": 1}, "num_embeds_ada_norm=1, but the data need 3"),
    (UNET, {"block_out_channels": []}, "block_out_channels=0 must be"),
    (UNET, {"block_out_channels": [8, 10**9]}, "block_out_channels=1000000000 must be"),
    (UNET, {"layers_per_block": -1}, "layers_per_block=-1 must be"),
    (UNET, {"norm_num_groups": 0}, "norm_num_groups=0 must be"),
    (UNET, {"freq_shift": "a"}, "freq_shift='a' is not a finite number"),
    (UNET, {"time_embedding_type": "nope"}, "its config cannot be built (UnboundLocalError: "),
    (UNET, {"time_embedding_type": "fourier"}, "takes the logarithm of timesteps"),
)
# script, flags; what is told
FLAGS: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("text_to_image", ("--resolution", 3), "--resolution is 3: the pipeline's autoencoder takes 4"),
    ("class_conditional", ("--resolution", 7), "resolution=7 does not fit the AutoencoderKL"),
    ("unconditional", ("--resolution", 7), "2 levels do not halve the 7 x 7 input"),
    ("unconditional", ("--power_ema", 0.05, 0.05), "--power_ema is 0.05 0.05: give each once"),
    ("vit_vqgan", ("--resolution", 7), "image_size=7 must be a positive multiple of patch_size=4"),
    ("vit_vqgan", ("--model_args", "encoder_depth=1000000000"), "depth=1000000000 must be"),
    ("vit_vqgan", ("--model_args", "encoder_dim=1000000000"), "dim=1000000000 must be"),
    ("vit_vqgan", ("--model_args", "codebook_size=1000000000"), "codes=1000000000 must be"),
    ("vit_vqgan", ("--model_args", "codebook_dim=1000000000"), "codebook_dim=1000000000 must be"),
    ("vit_vqgan", ("--model_args", "in_channels=1000000000"), "in_channels=1000000000 must be"),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def refused(script: Script, *more: object) -> str:
    """The message with which a run ends before its first update."""
    with (
        mock.patch.object(job, "make_update", side_effect=Reached),
        little_memory(),
        pytest.raises(UsageError) as refusal,
    ):
        script.main(*more)
    return str(refusal.value)


@pytest.mark.reliability
@pytest.mark.parametrize(("place", "changes", "told"), CONFIGS)
def test_a_config_that_makes_no_network(
    place: tuple[str, str],
    changes: dict[str, Any],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, file = place
    own = json.loads((FIXTURES / name / "pipeline" / file).read_text("utf-8"))
    (tmp_path / file).write_text(json.dumps(own | changes), "utf-8")
    flag = "--model_config" if name == "class_conditional" else "--model_config_name_or_path"
    assert told in refused(Script(name, tmp_path, monkeypatch), flag, tmp_path / file)


@pytest.mark.reliability
@pytest.mark.parametrize(("name", "flags", "told"), FLAGS)
def test_a_flag_that_the_model_refuses(
    name: str, flags: tuple[object, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told in refused(Script(name, tmp_path, monkeypatch), *flags)


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_memory_that_ends_before_step_0_is_explained(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mock.patch.object(job, "build_optimizer", side_effect=error):
        told = refused(Script("own_job", tmp_path, monkeypatch))
    assert "out of memory with --train_batch_size 8" in told
    assert "no room" in told


_OF_OTHERS = ("eval_steps", "profile_steps")  # the one needs metrics, the other a longer run


def counts(task: Any, argv: list[str]) -> Iterator[object]:
    """The largest number for each flag that only counts and has an effect in a run."""
    args = task().parse(argv, machine=False)
    for flag in task.command_line.flags:
        counted = flag.type is int and flag.most == LARGEST and flag.name not in _OF_OTHERS
        if counted and flag.bound.holds(LARGEST) and all(need.holds(args) for need in flag.needs):
            yield from (f"--{flag.name}", LARGEST)


@pytest.mark.reliability
@pytest.mark.parametrize("name", SCRIPTS)
def test_counts_cost_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest run there can be starts at once, in little memory."""
    script = Script(name, tmp_path, monkeypatch)
    more = list(counts(task_of(name, monkeypatch), script.argv()))
    assert len(more) > 20
    with little_memory(), after_update() as noted, pytest.raises(Reached):
        script.main(*more, *(() if name == "vit_vqgan" else ("--curriculum_max_share", "inf")))
    assert noted[0].args.max_train_steps == LARGEST
