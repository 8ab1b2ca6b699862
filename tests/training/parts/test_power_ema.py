"""Power-function averages against sums over all steps, quadrature and brute least squares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from diffusers_curriculum.training.checkpoint.checkpoints import save_checkpoint
from diffusers_curriculum.training.checkpoint.state import TrainingState
from diffusers_curriculum.training.errors import UsageError
from diffusers_curriculum.training.parts.averages import ema_weights
from diffusers_curriculum.training.parts.power_ema import PowerEMA, config_hash, forget_later
from diffusers_curriculum.training.parts.reconstruction import (
    MAX_SIGMA_REL,
    gamma_of,
    inner_products,
    list_snapshots,
    plan_reconstruction,
    reconstructed,
    solve_mixture,
)
from tests.training.tiny_state import make_state

STEPS = 400


def course(steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Weights (steps, 6) that drift and wander around a mean far from 0, float32."""
    rng = np.random.default_rng(seed)
    walk = rng.standard_normal((steps, 6)).cumsum(0) / steps**0.5
    return (5 + np.log1p(np.arange(steps))[:, None] / 4 + walk).astype(np.float32)


def direct(weights: np.ndarray, gamma: float) -> np.ndarray:
    """The mean under the power function's mass in each step's unit of time, float64."""
    steps = len(weights)
    masses = np.diff((np.arange(steps + 1) / steps) ** (gamma + 1))
    return masses @ weights.astype(np.float64)


def width(gamma: float) -> float:
    """The standard deviation of the density (gamma + 1) x^gamma on [0, 1]."""
    return ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2)


def reconstruct(folder: Path, *asked, **settings) -> dict[str, torch.Tensor]:
    return dict(reconstructed(plan_reconstruction(folder, *asked, **settings)))


class Followed:
    """A module that goes through a given course, and its averages."""

    def __init__(self, weights: np.ndarray, **settings) -> None:
        self.weights = torch.from_numpy(weights)
        self.model = torch.nn.ParameterDict(
            {"a": torch.nn.Parameter(torch.zeros(4)), "b": torch.nn.Parameter(torch.zeros(2, 1))}
        )
        self.ema = PowerEMA(self.model.named_parameters(), **settings)

    def go(self, step: int) -> None:
        row = self.weights[step - 1]
        with torch.no_grad():
            self.model["a"].copy_(row[:4])
            self.model["b"].copy_(row[4:, None])

    def run(self, folder: Path, every: int, begin: int = 1) -> None:
        for step in range(begin, len(self.weights) + 1):
            self.go(step)
            self.ema.update(step)
            if step % every == 0:
                self.ema.snapshot(folder, step)


def joined(tensors) -> np.ndarray:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double().numpy()


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    Followed(course()).run(folder, every=25)
    return folder


# -- widths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_stated_in_the_paper(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.2886, MAX_SIGMA_REL])
def test_the_exponent_is_the_root_and_goes_round(sigma_rel):
    gamma = gamma_of(sigma_rel)
    found = scipy.optimize.brentq(lambda g: width(g) - sigma_rel, -1e-9, 2e4, xtol=1e-13)
    assert gamma == pytest.approx(found, rel=1e-9, abs=1e-8)
    assert width(gamma) == pytest.approx(sigma_rel, rel=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 6.94])
def test_the_width_is_the_standard_deviation_of_the_profile(gamma):
    first, second = (
        scipy.integrate.quad(lambda x, k=k: (gamma + 1) * x ** (gamma + k), 0, 1)[0] for k in (1, 2)
    )
    assert width(gamma) == pytest.approx((second - first**2) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, float("nan"), float("inf")])
def test_a_width_without_an_exponent_is_refused(sigma_rel):
    with pytest.raises(UsageError, match=r"sigma_rel is .*at most 0\.2887"):
        gamma_of(sigma_rel)


# -- averaging -------------------------------------------------------------------------------------


def test_an_average_is_the_mean_under_the_power_function(tmp_path):
    followed = Followed(course(60), sigma_rels=(0.05, 0.2))
    followed.run(tmp_path, every=1000)
    for sigma_rel, averages in followed.ema.averages.items():
        expected = direct(course(60), gamma_of(sigma_rel))
        np.testing.assert_allclose(joined(averages), expected, rtol=1e-6)


def test_each_update_is_the_papers(tmp_path):
    followed = Followed(course(3), sigma_rels=(0.1,))
    own = None
    for t in (1, 2, 3):
        beta = (1 - 1 / t) ** (6.937203937601806 + 1)
        now = course(3)[t - 1].astype(np.float64)
        own = now if own is None else beta * own + (1 - beta) * now
        followed.go(t)
        followed.ema.update(t)
        np.testing.assert_allclose(joined(followed.ema.averages[0.1]), own, rtol=2e-7)


def test_weights_stand_for_the_steps_left_out(tmp_path):
    sparse, dense = Followed(course(8)), Followed(course(8).repeat(5, axis=0))
    for step in range(1, 9):
        sparse.go(step)
        sparse.ema.update(5 * step)
    dense.run(tmp_path, every=1000)
    for sigma_rel, averages in sparse.ema.averages.items():
        np.testing.assert_allclose(joined(averages), joined(dense.ema.averages[sigma_rel]), 1e-6)


def test_half_precision_weights_are_averaged_in_float32():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = PowerEMA([("w", weight)], (0.1,))
    for step in range(1, 2001):
        weight.data.fill_(1.0 if step < 2000 else 2.0)
        ema.update(step)
    share = 1 - (1 - 1 / 2000) ** (gamma_of(0.1) + 1)  # 0.004: bfloat16 would round it away
    torch.testing.assert_close(ema.averages[0.1][0], torch.full((3,), 1 + share))


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_step_is_averaged_once(step):
    ema = PowerEMA([("w", torch.ones(2))])
    ema.update(3)
    with pytest.raises(ValueError, match=f"step={step} must be later than 3"):
        ema.update(step)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_rels": ()}, "one or more"),
        ({"sigma_rels": (0.1, 0.1)}, "each once"),
        ({"sigma_rels": (0.1, 0.5)}, "sigma_rel is 0.5"),
        ({"dtype": "bfloat16"}, "--power_ema_dtype is 'bfloat16'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        PowerEMA([("w", torch.ones(2))], **settings)


def test_an_update_reads_nothing_back():
    # a meta tensor has no value to read: whatever a GPU would have to wait for raises
    model = torch.nn.Linear(3, 2, device="meta", dtype=torch.bfloat16)
    ema = PowerEMA(model.named_parameters())
    for step in (1, 2):
        ema.update(step)
    assert all(average.is_meta for averages in ema.averages.values() for average in averages)


def test_a_model_that_moved_is_refused():
    model = torch.nn.Linear(2, 2)
    ema = PowerEMA(model.named_parameters())
    ema.parameters = [parameter.to("meta") for parameter in ema.parameters]
    with pytest.raises(ValueError, match="averages are on cpu and the model on meta"):
        ema.update(1)


# -- in the model and in a checkpoint --------------------------------------------------------------


def test_the_first_width_is_shown_and_the_weights_come_back():
    followed = Followed(course(9), sigma_rels=(0.2, 0.05))
    for step in range(1, 10):
        followed.go(step)
        followed.ema.update(step)
    own = joined(followed.model.parameters())
    with ema_weights(followed.ema, [*followed.model.parameters()]):
        shown = joined(followed.model.parameters())
        with pytest.raises(RuntimeError, match="already in the model"):
            ema_weights(followed.ema, [*followed.model.parameters()]).__enter__()
    np.testing.assert_allclose(shown, direct(course(9), gamma_of(0.2)), rtol=1e-6)
    np.testing.assert_array_equal(joined(followed.model.parameters()), own)
    followed.ema.copy_to(followed.model.parameters(), 0.05)
    np.testing.assert_array_equal(
        joined(followed.model.parameters()), joined(followed.ema.averages[0.05])
    )
    with pytest.raises(UsageError, match=r"sigma_rel=0\.1 is not averaged: only \[0\.2, 0\.05\]"):
        followed.ema.copy_to(followed.model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="store"):
        followed.ema.restore(followed.model.parameters())


def test_a_resumed_run_writes_the_same_bytes(tmp_path):
    whole, part, rest = (Followed(course(40)) for _ in range(3))
    whole.run(tmp_path / "whole", every=10)
    folder = tmp_path / "resumed"
    part.run(folder, every=10)  # the killed run had come further than its checkpoint
    part = Followed(course(40))
    for step in range(1, 16):
        part.go(step)
        part.ema.update(step)
    state: TrainingState = make_state()
    state.trackers = {**state.trackers, "power_ema": part.ema}
    saved = save_checkpoint(tmp_path, 15, lambda path: state.write(path, 15), {})
    state.trackers = {**state.trackers, "power_ema": rest.ema}
    assert state.read(saved) == 15
    assert rest.ema.step == 15
    for sigma_rel, averages in part.ema.averages.items():
        np.testing.assert_array_equal(joined(rest.ema.averages[sigma_rel]), joined(averages))
    rest.run(folder, every=10, begin=16)
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) == 8
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_state_of_other_averages_is_refused_and_changes_nothing():
    one, other = PowerEMA([("w", torch.ones(2))]), PowerEMA([("v", torch.zeros(2))])
    with pytest.raises(ValueError, match="2 averaged parameters differ by name, such as v"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"widths \['0\.2'\], not \['0\.05', '0\.1'\]"):
        one.load_state_dict(PowerEMA([("w", torch.zeros(2))], (0.2,)).state_dict())
    assert one.step == 0
    assert all(average[0].eq(1).all() for average in one.averages.values())


# -- snapshots -------------------------------------------------------------------------------------


def test_a_snapshot_holds_the_averages_and_tells_what_they_are(tmp_path):
    model = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    ema = PowerEMA(model.named_parameters(), (0.05, 0.1), config=model.config)
    ema.update(7)
    paths = ema.snapshot(tmp_path, 7)
    assert [path.name for path in paths] == [
        "step-00000007-sigma_rel-0.05.safetensors",
        "step-00000007-sigma_rel-0.1.safetensors",
    ]
    assert load_file(paths[0]).keys() == dict(model.named_parameters()).keys()
    model.save_config(tmp_path)
    digest = config_hash(json.loads((tmp_path / "config.json").read_text()))
    assert [(s.step, s.sigma_rel, s.config) for s in list_snapshots(tmp_path)] == [
        (7, 0.05, digest),
        (7, 0.1, digest),
    ]
    assert digest != config_hash({**model.config, "layers_per_block": 2})


def test_half_precision_snapshots_are_half_the_size_and_must_fit(tmp_path):
    weight = torch.full((10_000,), 0.3)
    ema = PowerEMA([("w", weight)], (0.1,), dtype="float16")
    ema.update(1)
    (path,) = ema.snapshot(tmp_path, 1)
    assert 20_000 < path.stat().st_size < 20_500
    assert load_file(path)["w"].dtype == torch.float16
    assert reconstruct(tmp_path, 0.1)["w"].dtype == torch.float32
    before = path.read_bytes()
    weight.fill_(1e6)
    ema.update(2)
    with pytest.raises(ValueError, match=r"average of w is not finite in torch\.float16"):
        ema.snapshot(tmp_path, 2)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_only_the_present_step_can_be_saved(tmp_path):
    ema = PowerEMA([("w", torch.ones(2))])
    with pytest.raises(ValueError, match="step=0"):
        ema.snapshot(tmp_path, 0)
    ema.update(3)
    with pytest.raises(ValueError, match="step=4 is not the last one averaged, which is 3"):
        ema.snapshot(tmp_path, 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_older_file(tmp_path, monkeypatch, call):
    weight = torch.ones(2)
    ema = PowerEMA([("w", weight)], (0.1,))
    ema.update(1)
    (path,) = ema.snapshot(tmp_path, 1)
    before = path.read_bytes()

    def full(*unused: object) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(call, full)
    ema.averages[0.1][0].add_(1)
    with pytest.raises(OSError, match=r"No space for .*sigma_rel-0\.1"):
        ema.snapshot(tmp_path, 1)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_later_snapshots_and_half_written_ones_go(tmp_path):
    Followed(course(30)).run(tmp_path, every=10)
    (tmp_path / ".tmp-step-00000010-sigma_rel-0.1.safetensors-77").touch()
    (tmp_path / "notes.txt").touch()
    forget_later(tmp_path, 20)
    assert sorted({path.name[:13] for path in tmp_path.iterdir()}) == [
        "notes.txt",
        "step-00000010",
        "step-00000020",
    ]
    forget_later(tmp_path / "none", 0)


# -- reconstruction --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("g", "t", "h", "u"),
    [(16.97, 10, 6.94, 10), (16.97, 4, 6.94, 10), (0, 3, 2.5, 1), (1, 2, 1, 2)],
)
def test_inner_products_are_integrals(g, t, h, u):
    def product(x):
        return (g + 1) * x**g / t ** (g + 1) * (h + 1) * x**h / u ** (h + 1)

    expected = scipy.integrate.quad(product, 0, min(t, u), epsabs=0, epsrel=1e-12)[0]
    assert inner_products([g], [t], [h], [u])[0, 0] == pytest.approx(expected, rel=1e-10)


def test_coefficients_are_the_least_squares_solution_that_sums_to_one():
    times = [40.0, 70.0, 100.0]
    gammas, gamma, end = [gamma_of(0.1)] * 3, gamma_of(0.15), 90.0
    grid = (np.arange(200_000) + 0.5) / 2000

    def profile(g, t):
        return np.where(grid < t, (g + 1) * (grid / t) ** g / t, 0.0)

    basis = np.stack([profile(g, t) for g, t in zip(gammas, times, strict=True)], axis=1)
    target = profile(gamma, end)
    # the condition by substitution: the last coefficient is 1 minus the others
    free = np.linalg.lstsq(basis[:, :2] - basis[:, 2:], target - basis[:, 2], rcond=None)[0]
    expected = np.append(free, 1 - free.sum())
    found = solve_mixture(gammas, times, gamma, end)
    np.testing.assert_allclose(found.coefficients, expected, atol=1e-4)
    left = np.linalg.norm(target - basis @ expected) / np.linalg.norm(target)
    assert found.residual == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize(
    ("sigma_rel", "step", "tolerance"),
    [
        (0.075, None, 2e-4),
        (0.06, None, 2e-4),
        (0.12, None, 2e-4),
        (0.15, None, 5e-4),
        (0.075, 300, 5e-4),
    ],
)
def test_the_reconstruction_is_the_direct_average(snapshots, sigma_rel, step, tolerance):
    weights = course()[:step]
    expected = direct(weights, gamma_of(sigma_rel))
    found = reconstruct(snapshots, sigma_rel, step)
    assert found["a"].dtype == torch.float32
    assert found["b"].shape == (2, 1)
    error = np.abs(joined([found["a"], found["b"]]) - expected).max()
    other = np.abs(direct(weights, gamma_of(0.1)) - expected).max()
    assert error < tolerance
    assert error < other / 5  # far nearer than a snapshot of another width is


def test_an_average_at_hand_is_given_back(snapshots):
    plan = plan_reconstruction(snapshots, 0.1, 200)
    assert plan.residual < 1e-7
    found = joined(reconstruct(snapshots, 0.1, 200).values())
    saved = load_file(snapshots / "step-00000200-sigma_rel-0.1.safetensors")
    np.testing.assert_allclose(found, joined(saved[name] for name in ("a", "b")), rtol=1e-6)


def test_weights_that_stand_still_are_given_exactly(tmp_path):
    Followed(np.full((30, 6), 3.25, np.float32)).run(tmp_path, every=10)
    found = joined(reconstruct(tmp_path, 0.2, max_residual=1).values())
    np.testing.assert_allclose(found, 3.25, rtol=1e-7)


def test_what_the_snapshots_cannot_give_is_told(snapshots, tmp_path, caplog):
    with pytest.raises(UsageError, match=r"step=401 is outside 1\.\.400"):
        reconstruct(snapshots, 0.1, 401)
    with pytest.raises(UsageError, match="step=0 is outside"):
        reconstruct(snapshots, 0.1, 0)
    with pytest.raises(UsageError, match=r"leave 0\.\d+ of its profile out, more than 0\.1"):
        reconstruct(snapshots, 0.01)
    with pytest.raises(UsageError, match="choose step 300, where one was saved"):
        reconstruct(snapshots, 0.09, 310)
    assert caplog.messages == []
    assert plan_reconstruction(snapshots, 0.2).residual > 0.02
    assert "of its profile out" in caplog.messages[0]
    with pytest.raises(UsageError, match="holds no snapshots"):
        reconstruct(tmp_path, 0.1)


def test_snapshots_that_do_not_belong_together_are_refused(tmp_path):
    for name, config in (("w", {"layers": 1}), ("w", {"layers": 2})):
        ema = PowerEMA([(name, torch.ones(2))], (0.1,), config=config)
        ema.update(config["layers"])
        ema.snapshot(tmp_path, config["layers"])
    with pytest.raises(UsageError, match="are of different models"):
        reconstruct(tmp_path, 0.1)
    ema = PowerEMA([("v", torch.ones(2))], (0.1,), config={"layers": 1})
    ema.update(2)
    ema.snapshot(tmp_path, 2)
    with pytest.raises(UsageError, match="has other parameters than"):
        reconstruct(tmp_path, 0.1)


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_file_that_is_no_snapshot_is_refused(tmp_path, damage):
    path = tmp_path / "step-00000001-sigma_rel-0.1.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UsageError, match=r"sigma_rel-0\.1\.safetensors (is no|cannot be)"):
        list_snapshots(tmp_path)
