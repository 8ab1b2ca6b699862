"""--compile: the same run under the same names, through graphs that were looked at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusers_curriculum.training.arguments.command_line import Arguments
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.process import compilation, runtime
from tests.scripts.small_runs import Bench, hashes, make_class_bench, status
from tests.training.command_lines import parse_args

RUN = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--use_ema")
LATEST = ("--resume_from_checkpoint", "latest")


class Backend:
    """Runs graphs as they are, and counts them; ``fault`` is added to all that they give back."""

    def __init__(self) -> None:
        self.graphs, self.fault, self.options = 0, 0.0, {}

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any, options: Any) -> Any:
        self.graphs, self.options = self.graphs + 1, options
        return lambda *args: [out * (1 + self.fault) for out in graph.forward(*args)]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """What graphs are given to, in place of Inductor, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=(used := Backend())))
    torch._dynamo.reset()
    yield used
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_class_bench(tmp_path_factory.mktemp("classes"))


def names(folder: Path) -> dict[str, set[str]]:
    """Of the tensors in every file below a folder."""
    return {str(f.relative_to(folder)): {*load_file(f)} for f in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("how", ["full", "blocks"])
def test_a_compiled_run_is_the_same_run_and_is_resumed(
    classes: Bench, tmp_path: Path, backend: Backend, how: str
) -> None:
    plain = classes.train(tmp_path / "plain", *RUN)  # with dropout
    assert backend.graphs == 0
    whole = classes.train(tmp_path / "whole", *RUN, "--compile", how)
    assert backend.graphs > 0
    assert whole.steps == plain.steps
    assert names(tmp_path / "whole") == names(tmp_path / "plain")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    rest = classes.train(tmp_path / "parts", *RUN, "--compile", how, *LATEST)
    assert rest.steps == whole.steps[2:]
    last = [hashes(tmp_path / folder / "checkpoint-4") for folder in ("whole", "parts")]
    assert last[0] == last[1]
    # the way back is open where it is asked for by name
    argv = classes.argv(tmp_path / "parts", *RUN, "--max_train_steps", 5, *LATEST)
    assert status(argv, classes.script) == 2
    assert status([*argv, "--allow_config_change", "compile"], classes.script) == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "blocks"])
def test_through_inductor(
    classes: Bench, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "graphs"))
    torch._dynamo.reset()
    plain = classes.train(tmp_path / "plain", *RUN)
    whole = classes.train(tmp_path / "whole", *RUN, "--compile", how)
    losses = [[float.fromhex(loss) for loss in run.losses] for run in (plain, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert names(tmp_path / "whole") == names(tmp_path / "plain")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    rest = classes.train(tmp_path / "parts", *RUN, "--compile", how, *LATEST)
    assert rest.steps == whole.steps[2:]


def test_graphs_with_other_gradients_are_refused(
    classes: Bench, tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.fault = 0.5
    argv = classes.argv(tmp_path, *RUN, "--compile", "full")
    with pytest.raises(UsageError, match=r"--compile is full, and the gradient of .* is off by "):
        classes.module.main(argv)
    assert not [*tmp_path.rglob("checkpoint-*")]


class Sum(nn.Module):
    """Weights that begin at 0, and a buffer that a call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        nn.init.zeros_(self.last.weight)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.last(self.first(numbers).tanh())


@pytest.mark.parametrize("fault", [0.0, 0.5])
def test_a_look_changes_nothing(backend: Backend, fault: float) -> None:
    args, network = Arguments(compile="full", compile_mode=None), Sum()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    backend.fault = fault
    compilation.compile_network(args, network)
    outcome = pytest.raises(UsageError, match="the gradient of") if fault else nullcontext()
    with outcome:
        compilation.check_gradients(args, network, lambda: network(torch.ones(5, 3)))
    assert backend.graphs > 0
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert compilation.compiled_in(network) == "1 Sum"
    graphs = backend.graphs
    with compilation.uncompiled(args):
        network(torch.ones(7, 3))
    assert backend.graphs == graphs


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        (None, None),
        ("default", None),
        ("reduce-overhead", "triton.cudagraphs"),
        ("max-autotune-no-cudagraphs", "max_autotune"),
    ],
)
def test_a_mode_is_the_options_that_it_stands_for(
    backend: Backend, mode: str | None, name: str | None
) -> None:
    network = Sum()
    compilation.compile_network(Arguments(compile="full", compile_mode=mode), network)
    network(torch.ones(5, 3))
    options = {**backend.options}
    assert options.pop("fallback_random") is True
    assert (name in options) if name else not options
    assert ("triton.cudagraphs" in options) == (mode == "reduce-overhead")


def test_a_mode_is_part_of_what_is_resumed(
    classes: Bench, tmp_path: Path, backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = (*RUN, "--compile", "full")
    classes.train(tmp_path, *compiled, "--max_train_steps", 2)
    autotuned = ("--compile_mode", "max-autotune-no-cudagraphs")
    argv = classes.argv(tmp_path, *compiled, *LATEST, *autotuned)
    assert status(argv, classes.script) == 2
    told = "compile.compile_mode is max-autotune-no-cudagraphs, was unset"
    assert told in capsys.readouterr().err


def test_a_compiler_that_fails_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        raise ImportError("x.so: file too short")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/kept/graphs")
    args, network = Arguments(compile="full", compile_mode=None), Sum()
    compilation.compile_network(args, network)
    with pytest.raises(UsageError, match=r"file too short\).*delete the folder /kept/graphs, or"):
        compilation.check_gradients(args, network, lambda: network(torch.ones(5, 3)))


def test_what_cannot_be_compiled_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="Sum has no repeated blocks: give --compile full"):
        compilation.compile_network(Arguments(compile="blocks", compile_mode=None), Sum())
    (tmp_path / "a.png").touch()
    line = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path)]
    line += ["--output_dir", str(tmp_path / "run"), "--compile", "full"]
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with pytest.raises(UsageError, match="--compile is full, and accelerate compiles by EAGER"):
        runtime.make_accelerator(parse_args(line))
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    graphs = [*line, "--compile_mode", "reduce-overhead"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UsageError, match=r"reduce-overhead replays CUDA graphs and torch sees no CUDA"
    ):
        parse_args(graphs)
    with pytest.raises(UsageError, match="reduce-overhead with --gradient_accumulation_steps 2"):
        parse_args([*graphs, "--gradient_accumulation_steps", "2"])
    with pytest.raises(UsageError, match="has no effect without --compile blocks or full"):
        parse_args([*line[:-2], "--compile_mode", "default"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UsageError, match=r"needs a C\+\+ compiler and there is no no-such-compiler"
    ):
        parse_args(line)
