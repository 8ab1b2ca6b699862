"""Every family of models by every law, whole and by an adapter: it trains, shows pictures, goes on
bit for bit, and leaves what diffusers draws the same pictures with where this package is not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.families.base import families
from diffusers_curriculum.training.publish import text_to_image as publisher
from tests.scripts.elsewhere import PROMPT, STEPS, Elsewhere, drawn
from tests.scripts.small_runs import Bench, finite, hashes, write_images
from tests.text_adapters import TEXT_ADAPTERS
from tests.training.parts.families.flow_benches import FLOWS, PRESENT, RESOLUTION, pipeline_of

FOLDER = "examples.text_to_image.train_text_to_image"
ADAPTED = ("--rank", 2, "--lora_alpha", 3)
# of each family, whole and by an adapter: the script, and what it is told besides
SCRIPTS: dict[tuple[str, str], tuple[str, tuple[object, ...]]] = {
    ("sd", "whole"): ("train_text_to_image_curriculum", ()),
    ("sd", "adapter"): (f"{FOLDER}_lora_curriculum", ADAPTED),
    ("sdxl", "whole"): (f"{FOLDER}_sdxl_curriculum", ()),
    ("sdxl", "adapter"): (f"{FOLDER}_lora_sdxl_curriculum", (*ADAPTED, *TEXT_ADAPTERS)),
}
for _family in FLOWS:
    SCRIPTS[_family, "whole"] = (f"{FOLDER}_flow_curriculum", ())
    SCRIPTS[_family, "adapter"] = (f"{FOLDER}_flow_curriculum", ("--use_lora", *ADAPTED))
LAWS: dict[str, tuple[object, ...]] = {
    "uniform": (),
    "laplace": ("--timestep_sampler", "laplace"),
    "curriculum": (
        *("--curriculum", "difficulty", "--curriculum_clusters", 4),
        *("--curriculum_pacing", "fixed", "--curriculum_stage_steps", 1),
        *("--curriculum_max_share", 9),
    ),
}
CASES = [
    pytest.param(
        *script,
        law,
        # each script by one law in every run of the tests, by the others in the full tier
        marks=() if number % len(LAWS) == place else (pytest.mark.reliability, pytest.mark.slow),
    )
    for number, script in enumerate(SCRIPTS)
    for place, law in enumerate(LAWS)
]
LENGTH = 3  # optimizer steps
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    torch.set_num_threads(1)
    process = Elsewhere(tmp_path_factory.mktemp("elsewhere"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 6)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pictures that a run draws, of as few steps as elsewhere."""
    pictures, draw = list[Any](), publisher.validation_images

    def noting(*args: Any, **settings: Any) -> Any:
        found = draw(*args, **settings | {"steps": STEPS})
        pictures.append(found)
        return found

    monkeypatch.setattr(publisher, "validation_images", noting)
    return pictures


def test_no_family_is_left_out() -> None:
    assert {family for family, _ in SCRIPTS} == PRESENT.keys()


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("family", "trained", "law"), CASES)
def test_what_is_trained_is_what_is_drawn_elsewhere(
    family: str,
    trained: str,
    law: str,
    images: Path,
    tmp_path: Path,
    shown: list[Any],
    elsewhere: Elsewhere,
) -> None:
    is_adapter, base = trained == "adapter", pipeline_of(family)
    if is_adapter:
        pytest.importorskip("peft")
    script, more = SCRIPTS[family, trained]
    bench = Bench(base, images, images.parent / "cache", script)
    settings = ("--resolution", RESOLUTION, "--lr_warmup_steps", 0, "--use_ema", *more, *LAWS[law])
    length = ("--max_train_steps", LENGTH, "--checkpointing_steps", 1, "--report_to", "none")
    prompt = ("--validation_prompt", PROMPT, "--num_validation_images", 1)
    if script == Bench.script:
        prompt = ("--validation_prompts", PROMPT)

    # It trains, and draws on the way and at the end
    whole = bench.train(tmp_path / "whole", *settings, *length, *prompt, "--validation_steps", 2)
    assert whole.numbers == [*range(LENGTH)]
    assert finite(whole)
    assert len(shown) == 2
    tags = ModelCard.load(tmp_path / "whole" / "README.md").data.to_dict()["tags"]
    assert {*families()[family].tags, "text-to-image"} < {*tags}
    assert ("lora" in tags) == is_adapter

    # Stopped and resumed, the same losses and the same bits in every file; names of an adapter's
    # weights may be others at the end
    renamed = ("--save_format", "kohya") if is_adapter and family not in FLOWS else ()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")
    again = ("--resume_from_checkpoint", "latest", *renamed)
    rest = bench.train(tmp_path / "parts", *settings, *length, *again)
    assert rest.steps == whole.steps[1:]
    left, parts = (left_by(tmp_path / name, renamed) for name in ("whole", "parts"))
    assert left == parts
    assert len(left) > 3

    # Elsewhere, what is left draws as the models in memory, and as no model before
    saved = [tmp_path / "whole", tmp_path / "parts"][: 2 if renamed else 1]
    run, kind = whole.last, families()[family].pipeline
    with run.averages.shown():
        memory = drawn_in_memory(run)
    _, before = elsewhere.drawn(base, RESOLUTION)
    for folder in saved:
        pipeline, adapter = (base, folder) if is_adapter else (folder, None)
        name, picture = elsewhere.drawn(pipeline, RESOLUTION, adapter)
        assert name == kind
        # but for the last bits: where weights lie in memory may change those of a product
        torch.testing.assert_close(picture, memory, rtol=0, atol=1e-5)
        assert float((picture - before).abs().max()) > 1e-4
        assert abs(255 * picture[0].permute(1, 2, 0).numpy() - np.asarray(shown[-1][0])).max() < 1


def left_by(folder: Path, renamed: tuple[object, ...]) -> dict[str, str]:
    """Digests of what a run leaves: what is exported, and its last checkpoint."""
    others = ("run.json", *(f"checkpoint-{number}" for number in range(1, LENGTH)))
    others += (WEIGHTS,) if renamed else ()
    return {name: digest for name, digest in hashes(folder).items() if not name.startswith(others)}


def drawn_in_memory(run: Any) -> Any:
    """The picture of the models of a run, with the weights that they have now."""
    models = run.models
    for model in (models.network, *models.encoders.values()):
        model.eval()
    return drawn(run.family.pipeline_of(models, models.network, run.levels.inference), RESOLUTION)


@pytest.mark.parametrize(
    ("family", "modules", "unnamed"),
    [("flux", (), "transformer."), ("sdxl", ("to_q", "conv1"), "unet.down_blocks.0.resnets")],
)
def test_modules_that_kohya_has_no_name_for_are_refused(
    family: str, modules: tuple[str, ...], unnamed: str, images: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    script, more = SCRIPTS[family, "adapter"]
    more += ("--lora_target_modules", *modules) if modules else ()
    bench = Bench(pipeline_of(family), images, images.parent / "cache", script)
    line = bench.argv(tmp_path, *more, "--resolution", RESOLUTION, "--save_format", "kohya")
    with pytest.raises(UsageError, match=f"kohya's trainer calls {unnamed}.* is not known here"):
        bench.module.main(line)
