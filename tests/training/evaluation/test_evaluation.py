"""The evaluator: same numbers however many processes, in the record as in the trackers."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusers_curriculum.metrics.choices import METRICS, networks_of
from diffusers_curriculum.metrics.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffusers_curriculum.metrics.features import FeatureNetwork, eight_bit
from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.data.plan import chosen_rows, share
from diffusers_curriculum.training.data.transforms import ImageTransform
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.evaluation.evaluator import (
    FILE_NAME,
    Evaluator,
    make_evaluator,
    training_images,
)
from diffusers_curriculum.training.publish.metrics_record import read_metrics, write_metrics
from diffusers_curriculum.training.tasks.unconditional import Unconditional
from tests.metrics.tiny_networks import save

BILINEAR = ImageTransform(8, "bilinear", random_flip=True)
SETTINGS = {
    "eval_steps": 10,
    "eval_metrics": ("kid", "precision_recall", "fid"),
    "eval_samples": 21,
    "eval_num_inference_steps": 50,
    "eval_generation_batch_size": 4,
}


class Process:
    """The accelerator of one of several processes, which are threads here."""

    def __init__(self, rank: int = 0, room: Room | None = None) -> None:
        self.room = room or Room(1)
        self.process_index, self.num_processes = rank, self.room.count
        self.is_main_process = self.is_local_main_process = rank == 0
        self.device = torch.device("cpu")
        self.local_main_process_first = nullcontext
        self.trackers: list[Any] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self.room.exchange(self.process_index, tensor))

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return torch.stack(self.room.exchange(self.process_index, tensor)).sum(0)

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


class Room:
    """Where processes wait for each other."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=30)
        self.slots: list[Any] = [None] * count

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.slots[rank] = tensor.clone()
        self.barrier.wait()
        found = list(self.slots)
        assert len({x.shape for x in found}) == 1, "gathering wants equal sizes"
        self.barrier.wait()
        return found

    def run(self, work: Callable[[Process], Any]) -> list[Any]:
        found: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            found[rank] = work(Process(rank, self))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Patches(nn.Module):
    """Means of the four quarters of the first channel."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images[:, 0].float() / 255, 2).flatten(1)


def picture(number: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + number)
    return torch.rand(3, 8, 8, generator=generator) * (0.5 + 0.1 * seed)


def pictures(seed: int, asked: list[int] | None = None) -> Callable[[Sequence[int]], Tensor]:
    def images(numbers: Sequence[int]) -> Tensor:
        if asked is not None:
            asked.extend(numbers)
        return torch.stack([picture(number, seed) for number in numbers])

    return images


def evaluator(
    folder: Path,
    process: Any = None,
    samples: int = 21,
    seed: int = 0,
    last_step: int | None = None,
) -> Evaluator:
    args: Any = SimpleNamespace(**SETTINGS | {"eval_samples": samples, "output_dir": str(folder)})
    network_of = networks_of(args.eval_metrics, "patches")
    networks = {"patches": FeatureNetwork("patches", Patches())}
    run: dict[str, Any] = {"seed": seed, "last_step": last_step}
    run["facts"] = {"inference_steps": 50, "guidance_scale": None}
    return Evaluator(args, process or Process(), networks, network_of, pictures(1), 30, **run)


def test_metrics_are_those_of_the_chosen_images(tmp_path: Path) -> None:
    values = evaluator(tmp_path).evaluate(pictures(2), 10)
    see = FeatureNetwork("patches", Patches())
    rows = chosen_rows(30, 21, seed=0)
    real, made = see(pictures(1)(rows)), see(pictures(2)(range(21)))
    precision, recall = precision_recall(real, made)
    assert list(values) == ["kid", "precision", "recall", "fid"]
    assert values == pytest.approx(
        {
            "kid": kernel_distance(real, made),
            "precision": precision,
            "recall": recall,
            "fid": frechet_distance(real, made),
        },
        rel=1e-9,
    )
    assert values["fid"] > 1e-3


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_two_processes_share_the_work_and_agree_with_one(tmp_path: Path, processes: int) -> None:
    alone = evaluator(tmp_path).evaluate(pictures(2), 10)
    asked: dict[int, list[int]] = {rank: [] for rank in range(processes)}

    def work(process: Process) -> dict[str, float]:
        made = pictures(2, asked[process.process_index])
        return evaluator(tmp_path, process).evaluate(made, 10)

    assert Room(processes).run(work) == [alone] * processes
    assert sorted(chain.from_iterable(asked.values())) == list(range(21))
    assert len(asked[0]) == min(21, 4 * math.ceil(6 / processes))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("batch_size", [1, 4, 200])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_shares_hold_every_sample_once_in_whole_batches(
    count: int, batch_size: int, processes: int
) -> None:
    shares = [share(count, batch_size, rank, processes) for rank in range(processes)]
    assert list(chain.from_iterable(own for own, _ in shares)) == list(range(count))
    assert all(own.start % batch_size == 0 for own, _ in shares if own)
    assert all(len(own) % batch_size == 0 for own, _ in shares if own and own.stop < count)
    assert len({rows for _, rows in shares}) == 1
    for rank, (own, rows) in enumerate(shares):  # so that gathered rows stand at their number
        assert own.start == min(count, rank * rows)
        assert len(own) <= rows


def test_evaluating_again_gives_the_same_and_touches_no_generator(tmp_path: Path) -> None:
    made = evaluator(tmp_path)
    made.evaluate(pictures(2), 10)
    before = torch.get_rng_state()
    first = made.evaluate(pictures(2), 10)
    assert made.evaluate(pictures(2), 20) == first
    assert evaluator(tmp_path).evaluate(pictures(2), 10) == first  # a resumed run
    assert made.evaluate(pictures(3), 30) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_chooses_the_training_images(tmp_path: Path) -> None:
    assert chosen_rows(30, 21, 0) != chosen_rows(30, 21, 1)
    assert chosen_rows(30, 100, 5) == list(range(30))
    assert len(set(chosen_rows(30, 21, 0))) == 21
    values = [evaluator(tmp_path, seed=seed).evaluate(pictures(2), 10)["fid"] for seed in (0, 1)]
    assert values[0] != values[1]


def test_when_it_is_due(tmp_path: Path) -> None:
    made = evaluator(tmp_path, last_step=25)
    assert [step for step in range(30) if made.is_due(step)] == [10, 20, 25]


def test_values_go_to_the_trackers_and_the_file(tmp_path: Path) -> None:
    process = Process()
    values = evaluator(tmp_path, process).evaluate(pictures(2), 10)
    assert process.logged == [(10, {f"eval/{name}": x for name, x in values.items()})]
    (line,) = (tmp_path / "eval_metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 10,
        **values,
        "samples": 21,
        "inference_steps": 50,
        "guidance_scale": None,
        "training_images": 21,
        "networks": dict.fromkeys(["kid", "precision_recall", "fid"], "patches"),
    }


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    Room(2).run(lambda p: evaluator(folders[p.process_index], p).evaluate(pictures(2), 10))
    assert [[f.name for f in folder.iterdir()] for folder in folders] == [
        ["eval_metrics.jsonl"],
        [],
    ]


def test_a_step_evaluated_again_replaces_its_line(tmp_path: Path) -> None:
    for step, value in ((10, 1.0), (30, 3.0), (20, 2.0), (30, 4.0)):
        write_metrics(tmp_path / FILE_NAME, step, {"fid": value}, {})
    lines = (tmp_path / "eval_metrics.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == [(10, 1.0), (20, 2.0), (30, 4.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["eval_metrics.jsonl"]


def test_a_damaged_line_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "eval_metrics.jsonl"
    path.write_text('{"step": 10, "fid": 1.0}\n{"step": 20, "fi\n[]\n{}\n')
    write_metrics(tmp_path / FILE_NAME, 30, {"fid": math.nan}, {})
    assert read_metrics(tmp_path / FILE_NAME) == {
        10: {"step": 10, "fid": 1.0},
        30: {"step": 30, "fid": None},
    }
    assert caplog.text.count("damaged line") == 3


def test_images_that_are_not_finite_give_nan_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounded to bytes, a NaN would count as a picture."""

    def broken(numbers: Sequence[int]) -> Tensor:
        images = pictures(2)(numbers)
        images[[n == 20 for n in numbers]] = math.nan
        return images

    values = evaluator(tmp_path).evaluate(broken, 10)
    assert all(math.isnan(x) for x in values.values())
    assert "not finite" in caplog.text
    assert read_metrics(tmp_path / FILE_NAME)[10]["fid"] is None


def test_another_number_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 images came for 4 samples"):
        evaluator(tmp_path).evaluate(lambda _: picture(0)[None], 10)


def test_too_few_images_are_refused_and_few_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match=r"3 are too few.*--eval_steps"):
        evaluator(tmp_path, samples=3)
    evaluator(tmp_path, samples=5)
    assert "singular" not in caplog.text
    evaluator(tmp_path, samples=4)
    assert "fid from 4 samples with the 4 features of patches: the covariance is" in caplog.text


def test_a_network_without_finite_features_is_refused_before_training(tmp_path: Path) -> None:
    networks = {"patches": FeatureNetwork("patches", Patches())}
    networks["patches"].module.register_forward_hook(lambda *_: torch.full((4, 4), math.nan))
    args: Any = SimpleNamespace(**SETTINGS | {"eval_samples": 4, "output_dir": str(tmp_path)})
    with pytest.raises(UsageError, match="not finite"):
        Evaluator(args, Process(), networks, {"fid": "patches"}, pictures(1), 30, seed=0)


def test_networks_wait_on_the_host(tmp_path: Path) -> None:
    made = evaluator(tmp_path)
    seen: list[Any] = []
    network = made.networks["patches"]
    move = network.to
    network.to = lambda device: (seen.append(str(device)), move(device))[1]  # pyright: ignore
    made.accelerator.device = torch.device("cpu", 0)
    made.evaluate(pictures(2), 10)
    assert seen == ["cpu:0", "cpu"]


# -- from a command line ---------------------------------------------------------------------------


def parsed(line: str, folder: Path) -> Arguments:
    words = ["--dataset_name", "some/data", "--output_dir", str(folder), *line.split()]
    return Unconditional().parse(words, machine=False)


def scans(folder: Path, count: int) -> datasets.Dataset:
    folder.mkdir()
    for i in range(count):
        pixels = eight_bit(picture(i)).permute(1, 2, 0).repeat(1, 2, 1)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    cells = [{"path": str(folder / f"{i}.png"), "bytes": None} for i in range(count)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": cells}, features=features)


def test_training_images_are_the_middle_unmirrored(tmp_path: Path) -> None:
    rows = scans(tmp_path / "scans", 3)
    found = training_images(rows, BILINEAR)([2, 0])
    bytes_ = torch.stack([eight_bit(picture(i)).repeat(1, 1, 2)[:, :, 4:12] for i in (2, 0)])
    torch.testing.assert_close(found * 255, bytes_.float(), rtol=0, atol=1e-4)
    Path(rows[1]["image"]["path"]).write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"1\.png"):
        training_images(rows, BILINEAR)([1])


def test_an_evaluator_of_a_command_line(tmp_path: Path) -> None:
    save("resnet", tmp_path / "network")
    line = f"--eval_steps 5 --eval_metrics kid precision_recall --eval_samples 8 \
        --eval_generation_batch_size 3 --eval_feature_model {tmp_path / 'network'}"
    real = training_images(scans(tmp_path / "scans", 9), BILINEAR)
    made = make_evaluator(parsed(line, tmp_path), Process(), real, 9, seed=3, last_step=7)
    assert made is not None
    assert [step for step in range(9) if made.is_due(step)] == [5, 7]
    assert set(made.evaluate(pictures(0), 5)) == {"kid", "precision", "recall"}
    assert read_metrics(tmp_path / FILE_NAME)[5]["networks"]["kid"] == str(tmp_path / "network")


def test_without_the_flag_there_is_none(tmp_path: Path) -> None:
    assert make_evaluator(parsed("", tmp_path), Process(), pictures(0), 9, seed=0) is None


@pytest.mark.parametrize("metric", METRICS)
def test_a_network_that_cannot_be_had_is_told_with_its_metric(metric: str, tmp_path: Path) -> None:
    """No torch-fidelity here, and no network to download DINOv2 from."""
    arguments = parsed(f"--eval_steps 5 --eval_metrics {metric}", tmp_path)
    with pytest.raises(UsageError, match=rf"--eval_metrics {metric}: .*--eval_feature_model"):
        make_evaluator(arguments, Process(), pictures(0), 9, seed=0)
