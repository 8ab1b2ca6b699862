"""Steps of the image scripts against formulas: diffusers' train_unconditional.py and the papers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffusers_curriculum import Objective
from tests.scripts.image_runs import CLASS_SCRIPT, UNCONDITIONAL_SCRIPT, Materials, make_materials
from tests.scripts.small_runs import train

SCRIPTS = {"class": CLASS_SCRIPT, "unconditional": UNCONDITIONAL_SCRIPT}
CURRICULUM = (
    *("--curriculum", "difficulty", "--curriculum_clustering", "explicit"),
    *("--curriculum_boundaries", 0, 250, 500, 750, "--curriculum_max_share", 4),
    *("--curriculum_pacing", "fixed", "--curriculum_stage_steps", 2),
)


@dataclass
class Witness:
    """What went into one micro-batch of a run, and what came out."""

    images: Tensor
    sample: Tensor
    noise: Tensor
    input: Tensor
    timesteps: Tensor
    labels: Tensor | None
    output: Tensor
    loss: Tensor
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    config: dict[str, Any]


def watched(argv: list[str], script: str) -> tuple[list[Witness], Any]:
    """Train, and note everything about every micro-batch; also returns the script's run."""
    module, noted, witnesses = importlib.import_module(script), {}, []
    step, add_noise = module.training_step, Objective.add_noise

    def added(self: Objective, sample: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        noted.update(sample=sample.clone(), noise=noise.clone())
        return add_noise(self, sample, noise, at)

    def called(network: Any, given: Any, options: Any, output: Any) -> None:
        noted.update(input=given[0].clone(), timesteps=given[1].clone())
        noted.update(labels=options.get("class_labels"), output=output[0].detach().clone())

    def stepped(run: Any, number: int, slots: Any, batch: Any) -> Any:
        network = run.network
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        hook = network.register_forward_hook(called, with_kwargs=True)
        result = step(run, number, slots, batch)
        hook.remove()
        gradients = {k: p.grad.clone() for k, p in network.named_parameters()}
        witnesses.append(
            Witness(
                **noted,
                images=batch["pixel_values"],
                loss=result[2][0],
                weights=weights,
                gradients=gradients,
                config=dict(network.config),
            )
        )
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "add_noise", added)
        patch.setattr(module, "training_step", stepped)
        record = train(argv, script=script)
    return witnesses, record.last


Runner = Callable[..., list[Witness]]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    torch.set_num_threads(1)
    return make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture
def run(materials: Materials, tmp_path: Path) -> Runner:
    def call(script: str, *more: object, network: str = "unet", space: str = "pixels", steps=1):
        argv = materials.argv(tmp_path, SCRIPTS[script], network, space, *more)
        return watched([*argv, "--max_train_steps", str(steps)], SCRIPTS[script])[0]

    return call


# -- diffusers' train_unconditional.py -------------------------------------------------------------


def official(witness: Witness, kind: str, schedule: str = "linear") -> tuple[Tensor, Any]:
    """Loss and gradients by the formulas of the official script, through diffusers' functions."""
    settings: dict[str, Any] = {"beta_schedule": schedule, "prediction_type": kind}
    scheduler: Any = DDPMScheduler(**settings)
    network: Any = UNet2DModel.from_config(witness.config)
    network.load_state_dict(witness.weights)
    images, t = witness.images, witness.timesteps
    noisy = scheduler.add_noise(images, witness.noise, t)
    predicted = network(noisy, t).sample.float()
    if kind == "epsilon":
        loss = F.mse_loss(predicted, witness.noise.float())
    else:
        power = scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        loss = (power / (1 - power) * (predicted - images).square()).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.reliability
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_a_step_equals_the_official_one_bit_for_bit(run: Runner, schedule: str) -> None:
    (witness,) = run("unconditional", "--ddpm_beta_schedule", schedule)
    assert torch.equal(witness.sample, witness.images)
    loss, gradients = official(witness, "epsilon", schedule)
    assert torch.equal(witness.loss, loss)
    assert witness.gradients.keys() == gradients.keys()
    assert [k for k, g in gradients.items() if not torch.equal(witness.gradients[k], g)] == []
    assert sum(float(g.abs().sum()) for g in gradients.values()) > 0
    other = {"linear": "squaredcos_cap_v2"}.get(schedule, "linear")
    assert not torch.equal(official(witness, "epsilon", other)[0], loss)


@pytest.mark.reliability
def test_the_weighted_loss_of_images_equals_the_official_one(run: Runner) -> None:
    # The official script weights every pixel and then takes the mean; here the mean of a sample is
    # weighted, with weights rounded once from float64: the last bits differ, by a few times 6e-8.
    (witness,) = run("unconditional", "--prediction_type", "sample")
    loss, gradients = official(witness, "sample")
    assert witness.loss.dtype == torch.float32
    torch.testing.assert_close(witness.loss, loss, rtol=2e-6, atol=0.0)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            witness.gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest
        )
    unweighted = (witness.output - witness.images).square().mean()
    assert abs(float(unweighted / loss) - 1) > 0.01


def test_the_average_is_the_official_one(materials: Materials, tmp_path: Path) -> None:
    more = ("--use_ema", "--ema_inv_gamma", 2.0, "--ema_power", 0.6, "--ema_max_decay", 0.7)
    argv = materials.argv(tmp_path, UNCONDITIONAL_SCRIPT, "unet", "pixels", *more)
    seen, script_run = watched([*argv, "--max_train_steps", "6"], UNCONDITIONAL_SCRIPT)
    network: Any = UNet2DModel.from_config(seen[0].config)
    network.load_state_dict(seen[0].weights)
    average = EMAModel(
        network.parameters(),
        decay=0.7,
        use_ema_warmup=True,
        inv_gamma=2.0,
        power=0.6,
        model_cls=UNet2DModel,
        model_config=network.config,
    )
    decays, by_hand = [], [p.detach().clone().double() for p in network.parameters()]
    after = [*(witness.weights for witness in seen[1:]), script_run.network.state_dict()]
    for number, weights in enumerate(after):
        network.load_state_dict(weights)
        average.step(network.parameters())
        decays.append(min(1 - (1 + number / 2.0) ** -0.6, 0.7) if number else 0.0)
        for kept, new in zip(by_hand, network.parameters(), strict=True):
            kept.mul_(decays[-1]).add_((1 - decays[-1]) * new.detach().double())
    assert decays[1] < decays[4] < 0.7
    trained = list(script_run.network.parameters())
    shadows = script_run.averages.ema.shadow_params
    for ours, theirs, expected in zip(shadows, average.shadow_params, by_hand, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(shadows, trained, strict=True))


# -- the papers ------------------------------------------------------------------------------------


def expected(witness: Witness, kind: str, data: float) -> tuple[Tensor, Tensor]:
    """Network input and loss of each sample by the papers, in float64 from what was drawn."""
    x0, noise, output, t = (
        part.double() for part in (witness.sample, witness.noise, witness.output, witness.timesteps)
    )
    t = t.view(-1, 1, 1, 1)
    if kind == "flow":  # arXiv 2209.03003
        x, error = (1 - t / 1000) * x0 + t / 1000 * noise, output - (noise - x0)
        return x, error.square().mean(dim=(1, 2, 3))
    if kind == "edm":  # arXiv 2206.00364, table 1, with c_noise = ln(sigma) / 4
        sigma = (4 * t).exp()
        total = sigma**2 + data**2
        x = x0 + sigma * noise
        denoised = data**2 / total * x + sigma * data / total.sqrt() * output
        weight = total / (sigma * data) ** 2
        return x / total.sqrt(), (weight * (denoised - x0).square()).mean(dim=(1, 2, 3))
    power = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t.long()]
    alpha, sigma = power.sqrt(), (1 - power).sqrt()
    target = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[kind]
    return alpha * x0 + sigma * noise, (output - target).square().mean(dim=(1, 2, 3))


FLAGS = {
    "epsilon": (),
    "v_prediction": ("--prediction_type", "v_prediction"),
    "sample": ("--prediction_type", "sample"),
    "flow": ("--formulation", "flow"),
    "edm": ("--formulation", "edm"),
}


@pytest.mark.parametrize(
    ("script", "kind", "network", "space"),
    [
        ("class", "epsilon", "dit", "VQModel"),
        ("class", "v_prediction", "unet", "pixels"),
        ("class", "sample", "dit", "pixels"),
        ("class", "flow", "dit", "AutoencoderKL"),
        ("class", "edm", "dit", "AutoencoderKL"),
        ("unconditional", "flow", "unet", "pixels"),
        ("unconditional", "edm", "unet", "pixels"),
        ("unconditional", "v_prediction", "dit", "pixels"),
    ],
)
def test_the_first_step_follows_the_paper(
    run: Runner, script: str, kind: str, network: str, space: str
) -> None:
    (witness,) = run(script, *FLAGS[kind], network=network, space=space)
    given, losses = expected(witness, kind, 0.5 if space == "pixels" else 1.0)
    torch.testing.assert_close(witness.input.double(), given, rtol=1e-4, atol=1e-5)
    assert float(witness.loss) == pytest.approx(float(losses.mean()), rel=2e-5)
    if kind == "edm":
        wrong = expected(witness, kind, 1.0 if space == "pixels" else 0.5)
        assert not torch.allclose(witness.input.double(), wrong[0], rtol=1e-2)
    known = witness.config.get("num_class_embeds", witness.config.get("num_embeds_ada_norm"))
    if script == "class":
        assert witness.labels is not None
        assert set(witness.labels.tolist()) <= {0, 1, 2, 3 if network == "unet" else 1000}
    else:  # a network that knows classes is told that there is none
        told = None if witness.labels is None else witness.labels.tolist()
        assert told == (None if network == "unet" else [known] * 4)


# -- between the timesteps of the table ------------------------------------------------------------


def table(kind: str) -> np.ndarray:
    """What a network is told at every level, cleanest first."""
    if kind == "flow":
        return np.arange(1, 1001.0)
    ramp = np.linspace(0, 1, 1001)[::-1]
    roots = 80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))  # arXiv 2206.00364, eq. 5
    return np.log(roots**7) / 4


def off_table(witness: Witness, kind: str) -> np.ndarray:
    t = witness.timesteps.double().numpy()
    scale = 1.0 if kind == "flow" else 1 / 1000
    return np.abs(t[:, None] - table(kind)[None]).min(axis=1) > 1e-3 * scale


@pytest.mark.parametrize("kind", ["flow", "edm"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_draws_lie_between_the_timesteps_unless_told_otherwise(
    run: Runner, script: str, kind: str
) -> None:
    more = ("--formulation", kind, "--timestep_sampler", "uniform")
    seen = run(script, *more, steps=3)
    off = np.concatenate([off_table(witness, kind) for witness in seen])
    assert all(witness.timesteps.dtype == torch.float32 for witness in seen)
    assert off.mean() > 0.7  # a few fall near one by chance


@pytest.mark.parametrize("kind", ["flow", "edm"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_discrete_timesteps_lie_on_the_table(run: Runner, script: str, kind: str) -> None:
    more = ("--formulation", kind, "--timestep_sampler", "uniform", "--discrete_timesteps")
    seen = run(script, *more, steps=2)
    assert not any(off_table(witness, kind).any() for witness in seen)
    given, losses = expected(seen[0], kind, 0.5)
    torch.testing.assert_close(seen[0].input.double(), given, rtol=1e-4, atol=1e-5)
    assert float(seen[0].loss) == pytest.approx(float(losses.mean()), rel=2e-5)


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_stages_bound_continuous_draws(run: Runner, kind: str) -> None:
    more = ("--formulation", kind, "--timestep_sampler", "uniform", *CURRICULUM)
    seen = run("class", *more, steps=4)
    told, off = table(kind), np.concatenate([off_table(witness, kind) for witness in seen])
    first, second = (
        np.concatenate([witness.timesteps.double().numpy() for witness in seen[start : start + 2]])
        for start in (0, 2)
    )
    assert told[749] < first.min() < first.max() <= told[-1] * (1 + 1e-3)
    assert told[499] < second.min() < told[749]
    assert off.mean() > 0.7


# -- classes ---------------------------------------------------------------------------------------


def test_dropping_classes_changes_no_other_draw(run: Runner) -> None:
    more = ("--random_flip", "--image_interpolation_mode", "nearest")
    kept, some, none = (run("class", *more, "--label_dropout", p)[0] for p in (0, 0.5, 1))
    for other in (some, none):
        for name in ("images", "noise", "timesteps", "input"):
            assert torch.equal(getattr(kept, name), getattr(other, name))
    assert kept.labels is not None
    assert some.labels is not None
    assert none.labels is not None
    assert none.labels.tolist() == [3] * 4
    assert 3 not in kept.labels.tolist()
    pairs = zip(kept.labels.tolist(), some.labels.tolist(), strict=True)
    assert all(b in (a, 3) for a, b in pairs)
    assert not torch.equal(kept.output, none.output)
