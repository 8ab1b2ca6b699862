"""The loop against closed forms: with the best network for one data point, every scheduler ends
at that point; one step of each family equals the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffusers_curriculum.pipelines.denoising import (
    Guidance,
    denoise,
    initial_noise,
    predictor,
    to_images,
)
from tests.pipelines.parts_fixtures import AUTOENCODERS, generator, tiny_dit

SHAPE = (3, 4, 6, 6)
POINT = torch.randn(SHAPE, generator=generator(1)).clamp(-0.9, 0.9)
NOISE = initial_noise(SHAPE, generator(2), "cpu")
Predict = Callable[[Tensor, Tensor, float], Tensor]


class Best:
    """The exact prediction for data that are one point, and the noise that each input holds.

    `levels(x, t)` gives (state, alpha, sigma) with state = alpha * data + sigma * noise, and
    `answer(alpha, sigma, noise, state)` what the network should say.
    """

    def __init__(self, levels: Callable[..., Any], answer: Callable[..., Tensor]) -> None:
        self.levels, self.answer = levels, answer
        self.noises: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, progress: float) -> Tensor:
        state, alpha, sigma = self.levels(x.double(), t.double().view(-1, 1, 1, 1))
        self.noises.append((state - alpha * POINT) / sigma)
        return self.answer(alpha, sigma, self.noises[-1], state).float()

    def drift(self) -> float:
        """How far the noise moved: not at all along the exact solution of the ODE."""
        return max(float((noise - self.noises[0]).abs().max()) for noise in self.noises)


def best_vp(kind: str, scheduler: Any) -> Best:
    """x = alpha data + sigma noise, read from the scheduler's alphas_cumprod."""
    answers = {
        "epsilon": lambda alpha, sigma, noise, state: noise,
        "sample": lambda alpha, sigma, noise, state: POINT.double(),
        "v_prediction": lambda alpha, sigma, noise, state: alpha * noise - sigma * POINT,
    }

    def levels(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        power = scheduler.alphas_cumprod[t.long()].double()
        return x, power.sqrt(), (1 - power).sqrt()

    return Best(levels, answers[kind])


def best_flow() -> Best:
    """noise - data, where x = (1 - sigma) data + sigma noise and sigma = t / 1000."""
    return Best(
        lambda x, t: (x, 1 - t / 1000, t / 1000), lambda alpha, sigma, noise, state: noise - POINT
    )


def best_edm(sigma_data: float, sign: float) -> Best:
    """F of EDM's denoiser (2206.00364, eq. 7); the input is already c_in * x."""

    def levels(x: Tensor, t: Tensor) -> tuple[Tensor, float, Tensor]:
        sigma = (4 * t).exp()
        return x * (sigma**2 + sigma_data**2).sqrt(), 1.0, sigma

    def answer(alpha: float, sigma: Tensor, noise: Tensor, state: Tensor) -> Tensor:
        total = sigma**2 + sigma_data**2
        skip, out = sigma_data**2 / total, sigma * sigma_data / total.sqrt()
        return sign * (POINT - skip * state) / out

    return Best(levels, answer)


VP = {
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": True},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": {},
    "EulerDiscreteScheduler": {"timestep_spacing": "leading"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "leading"},
}


STOCHASTIC = {"DDPMScheduler", "EulerAncestralDiscreteScheduler"}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", VP)
def test_vp_ends_at_the_data_point(name: str, kind: str) -> None:
    if name == "EulerAncestralDiscreteScheduler" and kind == "sample":
        pytest.skip("diffusers does not implement it")
    scheduler = getattr(diffusers, name)(prediction_type=kind, **VP[name])
    best = best_vp(kind, scheduler)
    ended = denoise(best, scheduler, NOISE, 20, generator(3))
    torch.testing.assert_close(ended, POINT, atol=2e-3, rtol=0)
    assert (best.drift() < 5e-3) == (name not in STOCHASTIC)


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_ends_at_the_data_point(name: str, shift: float) -> None:
    scheduler = getattr(diffusers, name)(shift=shift)
    best = best_flow()
    ended = denoise(best, scheduler, NOISE, 10, generator(3))
    torch.testing.assert_close(ended, POINT, atol=1e-5, rtol=0)
    assert best.drift() < 1e-2
    torch.testing.assert_close(best.noises[0].float(), NOISE)


@pytest.mark.parametrize("tokens", [256, None])
def test_dynamic_shifting_gets_its_shift_from_the_tokens(tokens: int | None) -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ended = denoise(best_flow(), scheduler, NOISE, 10, tokens=tokens)
    torch.testing.assert_close(ended, POINT, atol=1e-5, rtol=0)
    # mu = 0.5 at 256 tokens, on a line to 1.15 at 4096; 36 tokens is the input's own area
    mu = 0.5 if tokens else 0.5 + 0.65 * (36 - 256) / 3840
    last = 1 / 1000  # the schedule's smallest sigma before the shift
    shifted = 2.718281828459045**mu / (2.718281828459045**mu + (1 / last - 1))
    assert float(scheduler.sigmas[-2]) == pytest.approx(shifted, rel=1e-4)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize(("kind", "sign"), [("epsilon", 1.0), ("v_prediction", -1.0)])
def test_edm_ends_at_the_data_point(name: str, kind: str, sign: float) -> None:
    scheduler = getattr(diffusers, name)(prediction_type=kind, sigma_data=0.7)
    best = best_edm(0.7, sign)
    ended = denoise(best, scheduler, NOISE, 20, generator(3))
    torch.testing.assert_close(ended, POINT, atol=1e-3, rtol=0)
    assert best.drift() < 5e-3


def test_a_wrong_prediction_strays() -> None:
    """The oracle tells right from wrong: epsilon given as v, and another sigma_data."""
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    best = best_vp("epsilon", scheduler)
    denoise(best, scheduler, NOISE, 20)
    assert best.drift() > 0.1
    best = best_edm(0.7, 1.0)
    denoise(best, diffusers.EDMEulerScheduler(sigma_data=0.5), NOISE, 20)
    assert best.drift() > 0.1


def test_the_first_input_and_step_of_each_family() -> None:
    """With one step and a network that says 0, closed forms in the first noise level alone."""
    inputs: list[Tensor] = []

    def zero(x: Tensor, t: Tensor, progress: float) -> Tensor:
        inputs.append(x)
        return torch.zeros_like(x)

    flow = denoise(zero, diffusers.FlowMatchEulerDiscreteScheduler(), NOISE, 1)
    torch.testing.assert_close(inputs[0], NOISE, rtol=0, atol=0)
    torch.testing.assert_close(flow, NOISE, rtol=0, atol=0)
    edm = denoise(zero, diffusers.EDMEulerScheduler(sigma_max=80.0, sigma_data=0.5), NOISE, 1)
    start = NOISE * (80.0**2 + 1) ** 0.5
    torch.testing.assert_close(inputs[1], start / (80.0**2 + 0.25) ** 0.5)
    expected = start * 0.25 / (80.0**2 + 0.25)  # D = c_skip * x
    torch.testing.assert_close(edm, expected, atol=1e-4, rtol=0)
    scheduler: Any = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    vp = denoise(zero, scheduler, NOISE, 1)
    torch.testing.assert_close(vp, NOISE / scheduler.alphas_cumprod[999] ** 0.5)


def test_timesteps_are_one_per_sample_and_progress_counts_steps() -> None:
    seen: list[tuple[Tensor, float]] = []

    def spy(x: Tensor, t: Tensor, progress: float) -> Tensor:
        seen.append((t, progress))
        return x

    denoise(spy, diffusers.DDIMScheduler(timestep_spacing="trailing"), NOISE, 4)
    assert [t.tolist() for t, _ in seen] == [[n] * 3 for n in (999, 749, 499, 249)]
    assert [progress for _, progress in seen] == [0, 0.25, 0.5, 0.75]


# -- learned variance ------------------------------------------------------------------------------


def with_variance(output: Tensor) -> Tensor:
    return torch.cat([output, torch.full_like(output, 0.3)], dim=1)


def test_a_learned_variance_reaches_ddpm() -> None:
    """One step of DDPM with an interpolated log variance (2102.09672, eq. 15), by hand."""
    scheduler: Any = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    best = best_vp("epsilon", scheduler)
    seen: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, progress: float) -> Tensor:
        seen.append(x)
        return with_variance(best(x, t, progress))

    denoise(predict, scheduler, NOISE, 2, generator(3))
    powers = scheduler.alphas_cumprod.double()
    now, then = powers[500], powers[0]
    beta = 1 - now / then
    small, large = ((1 - then) / (1 - now) * beta).log(), beta.log()
    fraction = (0.3 + 1) / 2
    std = (0.5 * (fraction * large + (1 - fraction) * small)).exp()
    mean = then.sqrt() * beta / (1 - now) * POINT
    mean = mean + (1 - beta).sqrt() * (1 - then) / (1 - now) * NOISE
    drawn = (seen[1].double() - mean) / std
    fresh = torch.randn(SHAPE, generator=generator(3))
    torch.testing.assert_close(drawn.float(), fresh, atol=1e-3, rtol=0)


@pytest.mark.parametrize("config", [{}, {"variance_type": "learned_range"}])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_learned_variance_is_dropped_where_it_has_no_use(name: str, config: Any) -> None:
    kind = getattr(diffusers, name)
    scheduler = kind.from_config(kind().config, clip_sample=False, **config)
    best = best_vp("epsilon", scheduler)
    ended = denoise(lambda *args: with_variance(best(*args)), scheduler, NOISE, 10)
    torch.testing.assert_close(
        ended, denoise(best, kind.from_config(scheduler.config, variance_type=None), NOISE, 10)
    )
    torch.testing.assert_close(ended, POINT, atol=2e-3, rtol=0)


def test_a_variance_that_is_missing_is_told() -> None:
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="gives 4 channels, and the scheduler needs 8"):
        denoise(best_vp("epsilon", scheduler), scheduler, NOISE, 2)
    with pytest.raises(ValueError, match="gives 3 channels, and the scheduler needs 4 or 8"):
        denoise(lambda x, t, p: x[:, :3], diffusers.DDIMScheduler(), NOISE, 2)


# -- guidance --------------------------------------------------------------------------------------


class Labelled(torch.nn.Module):
    """A network that answers its label everywhere, and counts its calls' samples."""

    config = {"num_embeds_ada_norm": 10}  # noqa: RUF012
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool) -> Any:
        self.sizes.append(len(x))
        return (class_labels.view(-1, 1, 1, 1) * torch.ones(x.shape[0], 8, *x.shape[2:]),)


@pytest.mark.parametrize(
    ("scale", "progress", "expected"),
    [
        (3.0, 0.5, 10 + 3 * (2 - 10)),
        (1.0, 0.5, 2),
        (0.0, 0.5, 2),
        (3.0, 0.1, 2),
        (3.0, 0.8, 2),
        (3.0, 0.2, 10 + 3 * (2 - 10)),
    ],
)
def test_guidance_is_the_formula_inside_its_interval(
    scale: float, progress: float, expected: float
) -> None:
    network = Labelled()
    labels = torch.tensor([2, 2, 2])
    predict = predictor(network, labels, Guidance(scale, (0.2, 0.8)))
    output = predict(NOISE, torch.zeros(3), progress)
    assert output[:, :4].unique().tolist() == [expected]
    assert output[:, 4:].unique().tolist() == [2]  # the variance is not guided
    assert network.sizes == [3 if expected == 2 else 6]


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.4)])
def test_a_wrong_interval_is_told(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="guidance_interval"):
        Guidance(2.0, interval)


def test_the_network_works_in_its_own_dtype() -> None:
    network = tiny_dit().to(torch.bfloat16)
    output = predictor(network, torch.tensor([1, 2]))(torch.zeros(2, 4, 8, 8), torch.zeros(2), 0.0)
    assert output.dtype == torch.float32


# -- noise and images ------------------------------------------------------------------------------


def test_noise_of_one_generator_and_of_several() -> None:
    torch.testing.assert_close(NOISE, torch.randn(SHAPE, generator=generator(2)), rtol=0, atol=0)
    several = initial_noise(SHAPE, [generator(n) for n in (4, 5, 6)], "cpu")
    for index, seed in enumerate((4, 5, 6)):
        alone = torch.randn(SHAPE[1:], generator=generator(seed))
        torch.testing.assert_close(several[index], alone, rtol=0, atol=0)
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        initial_noise(SHAPE, [generator(), generator()], "cpu")


def test_the_global_generator_is_left_alone_where_one_is_given() -> None:
    before = torch.get_rng_state()
    scheduler = diffusers.DDPMScheduler()
    denoise(best_vp("epsilon", scheduler), scheduler, NOISE, 5, generator())
    assert torch.equal(before, torch.get_rng_state())


def test_forms_of_output() -> None:
    latents = torch.tensor([-3.0, -1.0, 0.0, 0.5, 3.0]).view(1, 1, 1, 5).expand(2, 3, 4, 5)
    expected = torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0]).expand(2, 3, 4, 5)
    torch.testing.assert_close(to_images(latents, None, "pt"), expected)
    assert to_images(latents, None, "latent") is latents
    array = to_images(latents, None, "np")
    assert array.shape == (2, 4, 5, 3)
    pictures = to_images(latents, None, "pil")
    assert [picture.size for picture in pictures] == [(5, 4), (5, 4)]
    assert pictures[0].getpixel((3, 0)) == (191, 191, 191)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_images_have_the_resolution_of_the_autoencoder(name: str) -> None:
    vae = AUTOENCODERS[name]()
    shape = {"pixels": (3, 16), "AutoencoderKL": (4, 8), "VQModel": (4, 8), "ViTVQModel": (8, 4)}
    channels, side = shape[name]
    latents = torch.randn(2, channels, side, side, generator=generator())
    assert to_images(latents, vae, "pt").shape == (2, 3, 16, 16)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_told(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps={steps}"):
        denoise(best_flow(), diffusers.FlowMatchEulerDiscreteScheduler(), NOISE, steps)


def test_a_scheduler_without_steps_is_told() -> None:
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler has no step"):
        denoise(best_flow(), diffusers.ScoreSdeVeScheduler(), NOISE, 2)
