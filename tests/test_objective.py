"""Loss and gradients against the inline computation of diffusers' training scripts, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from diffusers_curriculum.noise_levels import NoiseLevels
from diffusers_curriculum.objective import Objective
from diffusers_curriculum.weighting import loss_weights
from tests.floors_fixtures import SCHEDULERS, VARIANCE_PRESERVING, levels_of


class Convolutions(nn.Module):
    """A small network that sees the noisy sample and the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.time = nn.Linear(1, 16)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        shift = self.time(timesteps[:, None].float() / 1000)[:, :, None, None]
        return self.last(F.silu(self.first(x) + shift))


def unet() -> nn.Module:
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )

    class Sample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            return self.network(x, timesteps, return_dict=False)[0]

    return Sample()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"convolutions": Convolutions, "unet": unet}
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def _batch(seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, size, 4, 8, 8, generator=generator).unbind()
    ends = torch.tensor([0, 998])  # both ends of the schedule, but where epsilon is 0 / 0
    rest = torch.randint(1000, (size - 2,), generator=generator)
    return latents, noise, torch.cat([ends, rest])


def _official(scheduler: Any, snr_gamma: float | None) -> Loss:
    """What the scripts compute inline (arXiv 2303.09556, section 3.4, for the weighted loss)."""

    def loss(network: nn.Module, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        prediction = network(scheduler.add_noise(latents, noise, timesteps), timesteps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        if snr_gamma is None:
            return F.mse_loss(prediction.float(), target.float(), reduction="mean")
        snr = compute_snr(scheduler, timesteps)
        cap = snr_gamma * torch.ones_like(timesteps)
        weights = torch.stack([snr, cap], dim=1).min(dim=1)[0]
        weights = weights / (snr + 1) if velocity else weights / snr
        squares = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return (squares.mean(dim=[1, 2, 3]) * weights).mean()

    return loss


def _ours(levels: NoiseLevels, snr_gamma: float | None) -> Loss:
    objective = Objective(levels)
    weights = None if snr_gamma is None else loss_weights("min_snr", levels, gamma=snr_gamma)

    def loss(network: nn.Module, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        noisy = objective.add_noise(latents, noise, indices)
        prediction = network(noisy, levels.timesteps[indices])
        target = objective.target(latents, noise, indices)
        return objective.loss(prediction, target, None if weights is None else weights[indices])[0]

    return loss


def _value_and_gradients(network: nn.Module, loss: Loss, seed: int) -> tuple[Tensor, list[Tensor]]:
    network.zero_grad()
    value = loss(network, *_batch(seed))
    value.backward()
    return value.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING)
def test_loss_and_gradients_are_those_of_the_official_script_bit_for_bit(
    schedule: str, kind: str, snr_gamma: float | None, network: str
) -> None:
    torch.manual_seed(0)
    model = NETWORKS[network]()
    scheduler = SCHEDULERS[schedule](prediction_type=kind)
    levels = NoiseLevels.from_scheduler(scheduler)
    for seed in range(3):
        theirs = _value_and_gradients(model, _official(scheduler, snr_gamma), seed)
        ours = _value_and_gradients(model, _ours(levels, snr_gamma), seed)
        assert torch.equal(ours[0], theirs[0])
        assert len(ours[1]) == len(theirs[1]) == len(list(model.parameters()))
        for a, b in zip(ours[1], theirs[1], strict=True):
            assert torch.equal(a, b)
        assert any(float(gradient.abs().max()) > 0 for gradient in ours[1])


def test_the_comparison_can_fail() -> None:
    """Against another gamma, target or schedule the same comparison finds a difference."""
    torch.manual_seed(0)
    model = Convolutions()
    theirs = _value_and_gradients(model, _official(SCHEDULERS["sd"](), 5.0), 0)
    for other in (
        _ours(levels_of("sd"), 5.001),
        _ours(levels_of("sd", prediction_type="v_prediction"), 5.0),
        _ours(levels_of("linear"), 5.0),
    ):
        ours = _value_and_gradients(model, other, 0)
        assert not torch.equal(ours[0], theirs[0])
        assert not all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


def test_min_snr_epsilon_is_finite_at_zero_terminal_snr() -> None:
    latents, noise, _ = _batch()
    levels = levels_of("sd_zero_terminal")
    terminal = torch.full((8,), 999)
    value = _ours(levels, 5.0)(Convolutions(), latents, noise, terminal)
    assert bool(value.isfinite())
    official = _official(SCHEDULERS["sd_zero_terminal"](), 5.0)
    assert bool(official(Convolutions(), latents, noise, terminal).isnan())


# -- targets and losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["sd", "flow_shift_3", "edm"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow", "edm"])
def test_targets(schedule: str, kind: str) -> None:
    levels = levels_of(schedule).with_prediction_type(kind)
    latents, noise, indices = _batch()
    latents, noise = latents.double(), noise.double()
    shape = (-1, 1, 1, 1)
    alpha, sigma = levels.alpha[indices].view(shape), levels.sigma[indices].view(shape)
    foreign = {("v_prediction", "flow"), ("edm", "flow"), ("edm", "vp")}
    if (kind, levels.family) in foreign or (kind == "flow" and levels.family != "flow"):
        with pytest.raises(ValueError, match=f"'{kind}' is defined for the .* family"):
            Objective(levels)
        return
    objective = Objective(levels)
    expected = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": alpha * noise - sigma * latents,
        "flow": noise - latents,
    }
    if schedule == "edm":  # arXiv 2206.00364, eq. 8 and table 1, as they stand
        skip = 0.25 / (sigma**2 + 0.25)
        out = 0.5 * sigma / (sigma**2 + 0.25).sqrt()
        output = (latents - skip * (latents + sigma * noise)) / out
        expected |= {"edm": output, "epsilon": output, "v_prediction": -output}
    expected = expected[kind]
    target = objective.target(latents, noise, indices)
    torch.testing.assert_close(target, expected, atol=1e-11, rtol=0)
    noisy = objective.add_noise(latents, noise, indices)
    torch.testing.assert_close(noisy, alpha * latents + sigma * noise, atol=1e-12, rtol=1e-12)


def test_a_right_prediction_gives_back_the_data() -> None:
    """Target and noisy sample together determine x0, for every target."""
    latents, noise, indices = _batch()
    latents, noise = latents.double(), noise.double()
    indices = indices.clamp(0, 990)
    for schedule, kind in [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")]:
        levels = levels_of(schedule).with_prediction_type(kind)
        objective = Objective(levels)
        alpha = levels.alpha[indices].view(-1, 1, 1, 1)
        sigma = levels.sigma[indices].view(-1, 1, 1, 1)
        x = objective.add_noise(latents, noise, indices)
        target = objective.target(latents, noise, indices)
        x0 = {
            "epsilon": (x - sigma * target) / alpha,
            "v_prediction": alpha * x - sigma * target,
            "flow": x - sigma * target,
        }[kind]
        torch.testing.assert_close(x0, latents, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 8, 8), (5, 3, 2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_per_sample(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, *shape, generator=generator).to(dtype).unbind()
    prediction.requires_grad_()
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    objective = Objective(levels_of("sd"))
    expected = (prediction.detach().double() - target.double()).square().flatten(1).mean(1)
    plain, per_sample = objective.loss(prediction, target)
    assert per_sample.dtype == torch.float32
    assert not per_sample.requires_grad
    torch.testing.assert_close(per_sample.double(), expected, atol=0, rtol=1e-5)
    assert float(plain.detach()) == pytest.approx(float(expected.mean()), rel=1e-5)
    weighted, unweighted = objective.loss(prediction, target, weights)
    assert torch.equal(unweighted, per_sample)  # what is observed is never weighted
    assert float(weighted.detach()) == pytest.approx(float((expected * weights).mean()), rel=1e-5)
    weighted.backward()
    assert prediction.grad is not None
    assert float(prediction.grad[0].abs().max()) == 0
    assert float(prediction.grad[1].abs().max()) > 0


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0])])
def test_a_mask_says_where_errors_count_and_not_how_much(weights: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 3, 4, 4, generator=generator)
    errors = torch.tensor([2.0, 3.0]).view(2, 1, 1, 1).expand_as(target).clone()
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :1], mask[1, :, :, :2] = 1, 1
    errors = torch.where(mask.bool(), errors, 1e3)  # what is wrong outside is not seen
    prediction = (target + errors).requires_grad_()
    objective = Objective(levels_of("sd"))
    loss, losses = objective.loss(prediction, target, weights, mask / mask.mean((1, 2, 3), True))
    torch.testing.assert_close(losses, torch.tensor([4.0, 9.0]))
    assert float(loss.detach()) == pytest.approx(6.5 if weights is None else (4 + 27) / 2)
    loss.backward()
    assert prediction.grad is not None
    assert not bool(prediction.grad[~mask.bool().expand_as(target)].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_samples_are_kept(dtype: torch.dtype) -> None:
    latents, noise, indices = _batch()
    for schedule in ("sd", "flow", "edm"):
        objective = Objective(levels_of(schedule))
        noisy = objective.add_noise(latents.to(dtype), noise.to(dtype), indices)
        assert noisy.dtype == dtype
        assert objective.target(latents.to(dtype), noise.to(dtype), indices).dtype == dtype
        full = objective.add_noise(latents, noise, indices)
        bound = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
        error = (noisy.double() - full.double()).abs() / (full.abs() + full.abs().max())
        assert float(error.max()) < bound


DENOISING = [
    ("sd", "epsilon"),
    ("sd", "v_prediction"),
    ("sd", "sample"),
    ("flow_shift_3", "flow"),
    ("flow_shift_3", "epsilon"),
    ("edm", "edm"),
    ("edm", "v_prediction"),
    ("edm", "sample"),
]


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(("schedule", "kind"), DENOISING)
def test_denoised_is_the_inverse_of_the_target(schedule: str, kind: str, continuous: bool) -> None:
    objective = Objective(levels_of(schedule).with_prediction_type(kind))
    latents, noise, at = _batch()
    latents, noise, at = latents.double(), noise.double(), at.clamp(0, 990)
    if continuous:
        if schedule == "sd":
            with pytest.raises(ValueError, match="no levels between"):
                objective.target(latents, noise, at.double())
            return
        at = objective.levels.log_snr[at] - 0.003
    noisy, target = objective.add_noise(latents, noise, at), objective.target(latents, noise, at)
    # float32 tables of alpha and sigma do not add up to 1 beyond their seventh digit
    torch.testing.assert_close(objective.denoised(target, noisy, at), latents, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_that_of_the_scheduler(kind: str) -> None:
    scheduler = diffusers.EDMEulerScheduler(prediction_type=kind, sigma_data=0.8)  # pyright: ignore
    objective = Objective(NoiseLevels.from_scheduler(scheduler))
    latents, noise, indices = _batch()
    for at in (indices, objective.levels.log_snr[indices] + 0.01):
        sigma = objective.levels.coefficients(at)[1].view(-1, 1, 1, 1)
        noisy = objective.add_noise(latents, noise, at)
        torch.testing.assert_close(
            objective.scale_input(noisy, at).double(),
            scheduler.precondition_inputs(noisy.double(), sigma),
            atol=1e-6,
            rtol=1e-6,
        )
        prediction = latents.flip(0)
        found = objective.denoised(prediction, noisy, at).double()
        theirs = scheduler.precondition_outputs(noisy.double(), prediction.double(), sigma)
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-6)


def test_the_edm_target_keeps_its_digits_at_small_noise() -> None:
    """(x0 - c_skip x) / c_out in float32 would be off by 1e-5 at sigma = 0.002."""
    objective = Objective(levels_of("edm"))
    latents, noise, _ = _batch()
    cleanest = torch.zeros(8, dtype=torch.int64)
    exact = objective.target(latents.double(), noise.double(), cleanest)
    found = objective.target(latents, noise, cleanest).double()
    assert float((found - exact).abs().max()) < 1e-6


def test_inputs_without_preconditioning_are_left_alone() -> None:
    latents, _, indices = _batch()
    for schedule, kind in [("sd", "epsilon"), ("flow", "flow"), ("edm", "sample")]:
        objective = Objective(levels_of(schedule).with_prediction_type(kind))
        assert objective.scale_input(latents, indices) is latents


def test_edm_on_levels_without_sigma_data_is_refused() -> None:
    for kind in ("edm", "v_prediction"):
        levels = NoiseLevels.from_scheduler(diffusers.ScoreSdeVeScheduler())
        with pytest.raises(ValueError, match=rf"'{kind}'.*sigma_data=None: choose from epsilon, s"):
            Objective(levels.with_prediction_type(kind))


def test_unknown_prediction_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction_type='score' is unknown: choose from"):
        Objective(levels_of("sd").with_prediction_type("score"))


# -- MixFlow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["flow", "flow_shift_3"])
def test_slower_levels_are_nearer_to_pure_noise_by_a_share(schedule: str) -> None:
    """sigma + share (1 - sigma), at levels of the table, between them and at pure noise."""
    levels = levels_of(schedule)
    objective, share = Objective(levels), torch.tensor([0.0, 0.3, 0.8, 0.5])
    at = torch.tensor([0, 400, 700, 999])
    sigma = levels.sigma[at]
    expected = sigma + share * (1 - sigma)
    for place in (at, levels.log_snr[at]):
        slower = objective.slowed(place, share)
        torch.testing.assert_close(levels.coefficients(slower)[1], expected, atol=1e-7, rtol=0)
    x0, noise = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0)).unbind()
    noisy = objective.add_noise(x0, noise, slower)
    mixed = expected[:, None, None] * noise + (1 - expected)[:, None, None] * x0
    torch.testing.assert_close(noisy, mixed.float(), atol=1e-6, rtol=1e-6)


def test_slower_levels_are_those_of_flows() -> None:
    with pytest.raises(ValueError, match="this schedule is 'vp'"):
        Objective(levels_of("sd")).slowed(torch.tensor([3]), torch.tensor([0.5]))
