"""ViT-VQGAN's autoencoder, its critic and its losses, each against a computation of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin, VQModel
from torch import Tensor, nn

from diffusers_curriculum.models import vit_vq
from diffusers_curriculum.models.discriminator import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from diffusers_curriculum.models.reconstruction import (
    PerceptualDistance,
    logit_laplace_loss,
    psnr,
    squared_errors,
)
from diffusers_curriculum.models.vision_transformer import TransformerBlock, sin_cos_positions
from diffusers_curriculum.models.vit_vq import VIT_VQ_SIZES, ViTVQModel, vit_vq_config

TINY: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    **{f"encoder_{k}": v for k, v in {"dim": 16, "depth": 2, "heads": 2, "mlp": 24}.items()},
    **{f"decoder_{k}": v for k, v in {"dim": 24, "depth": 1, "heads": 3, "mlp": 32}.items()},
    "codebook_size": 64,
    "codebook_dim": 8,
}


def seeded(seed: int, build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def model(**changes: Any) -> Any:
    return seeded(0, lambda: ViTVQModel(**(TINY | changes))).eval()


def images(count: int = 3, size: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, size, size, generator=generator) * 2 - 1


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "encoder", "decoder"),
    [
        ("small", (512, 8, 8, 2048), (512, 8, 8, 2048)),
        ("base", (768, 12, 12, 3072), (768, 12, 12, 3072)),
        ("large", (512, 8, 8, 2048), (1280, 32, 16, 5120)),
    ],
)
def test_published_sizes(size: str, encoder: tuple[int, ...], decoder: tuple[int, ...]) -> None:
    with torch.device("meta"):
        built: Any = ViTVQModel(**vit_vq_config(size, resolution=256))
    for part, (dim, depth, heads, mlp) in ((built.encoder, encoder), (built.decoder, decoder)):
        per_block = 4 * dim * dim + 4 * dim + 2 * dim * mlp + mlp + dim + 4 * dim
        expected = depth * per_block + 1024 * dim + 2 * dim
        assert sum(p.numel() for p in part.parameters()) == expected
        assert {block.attention.heads for block in part.blocks} == {heads}
    assert built.quantise.embedding.weight.shape == (8192, 32)
    assert built.patchify.kernel_size == (8, 8)
    assert built.config.scaling_factor == math.sqrt(32)


def test_sizes_take_changes_and_must_be_known() -> None:
    config = vit_vq_config("base", resolution=64, patch_size=4, codebook_size=256)
    assert (config["image_size"], config["patch_size"], config["codebook_size"]) == (64, 4, 256)
    assert set(VIT_VQ_SIZES) == {"small", "base", "large"}
    with pytest.raises(ValueError, match=r"'huge' is unknown.*small, base, large"):
        vit_vq_config("huge")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_size": 18}, "image_size=18 must be a positive multiple of patch_size=4"),
        ({"encoder_heads": 3}, "dim=16 with 3 heads"),
        ({"decoder_dim": 30}, "dim=30 with 3 heads"),
        ({"encoder_depth": 0}, "depth=0"),
        ({"codebook_size": 1}, "codes=1 must be"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ViTVQModel(**(TINY | changes))


# -- the transformer -------------------------------------------------------------------------------


def test_a_block_is_torchs_own_encoder_layer_with_tanh() -> None:
    block = seeded(1, lambda: TransformerBlock(12, 3, 20))
    other = nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0.0, activation=torch.tanh, batch_first=True, norm_first=True
    )
    other.load_state_dict(
        {
            "self_attn.in_proj_weight": block.attention.to_qkv.weight,
            "self_attn.in_proj_bias": block.attention.to_qkv.bias,
            "self_attn.out_proj.weight": block.attention.to_out.weight,
            "self_attn.out_proj.bias": block.attention.to_out.bias,
            **{f"norm1.{k}": v for k, v in block.norm1.state_dict().items()},
            **{f"norm2.{k}": v for k, v in block.norm2.state_dict().items()},
            **{f"linear1.{k}": v for k, v in block.feed_forward[0].state_dict().items()},
            **{f"linear2.{k}": v for k, v in block.feed_forward[2].state_dict().items()},
        }
    )
    tokens = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(block(tokens), other(tokens), atol=1e-6)


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    table = sin_cos_positions(5, 8)
    for row in range(5):
        for column in range(5):
            expected = []
            for place in (row, column):
                angles = [place * 10000.0 ** -(k / 2) for k in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert table[row * 5 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for switch in (False, True):
        one = model().train()
        if switch:
            one.enable_gradient_checkpointing()
        assert one.encoder.gradient_checkpointing is switch
        output = one(images())
        (output.sample.square().mean() + output.commit_loss).backward()
        gradients.append([p.grad for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0])


# -- latents ---------------------------------------------------------------------------------------


def test_latents_are_unit_vectors() -> None:
    latents = model().encode(images()).latents
    assert latents.shape == (3, 8, 4, 4)
    assert torch.allclose(latents.norm(dim=1), torch.ones(3, 4, 4), atol=1e-6)
    assert latents.square().mean().item() == pytest.approx(1 / 8)


def test_a_place_in_the_latents_is_a_place_in_the_image() -> None:
    """Of one patch only the position of its token changes before any attention."""
    one = model()
    tokens = []
    one.encoder.register_forward_hook(lambda module, args, output: tokens.append(args[0]))
    picture = images(1)
    changed = picture.clone()
    changed[:, :, 4:8, 12:16] *= -1  # second row, fourth column
    one.encode(picture)
    one.encode(changed)
    different = (tokens[0] - tokens[1]).abs().sum(-1)[0] > 0
    assert different.nonzero().tolist() == [[1, 3]]


def test_a_code_decodes_into_its_own_patch() -> None:
    """Without attention and with one code changed, only its patch changes."""
    one = model()
    for block in one.decoder.blocks:
        nn.init.zeros_(block.attention.to_out.weight)
    latents = one.encode(images(1)).latents.detach()
    changed = latents.clone()
    changed[:, :, 1, 3] *= -1
    both = [one.decode(h, force_not_quantize=True).sample.detach() for h in (latents, changed)]
    rows, columns = (both[0] - both[1]).abs().sum((0, 1)).nonzero().unbind(1)
    assert set(rows.tolist()) == set(range(4, 8))
    assert set(columns.tolist()) == set(range(12, 16))


@pytest.mark.parametrize("factor", [None, 3.7])
def test_scaling_and_unscaling_keep_every_code(factor: float | None) -> None:
    one = model(scaling_factor=factor)
    pixels = images(8)
    direct = one(pixels)
    latents = one.encode(pixels).latents
    diffusable = latents * one.config.scaling_factor
    if factor is None:
        assert diffusable.square().mean().item() == pytest.approx(1.0)
    back = diffusable / one.config.scaling_factor
    normalised = back / back.norm(dim=1, keepdim=True)
    for vectors in (latents, back, normalised):
        assert torch.equal(one.indices(vectors), direct.indices)
    assert torch.allclose(one.decode(back).sample, direct.sample, atol=1e-5)
    assert len(direct.indices.unique()) > 5


def test_decoding_takes_vectors_of_any_length() -> None:
    one = model()
    latents = one.encode(images()).latents
    lengths = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 5 + 0.1
    for raw in (False, True):
        near, far = (one.decode(h, force_not_quantize=raw) for h in (latents, latents * lengths))
        assert torch.allclose(near.sample, far.sample, atol=1e-5)
    assert not torch.allclose(
        one.decode(latents).sample, one.decode(latents, force_not_quantize=True).sample, atol=1e-3
    )


def test_unquantised_decoding_of_a_code_is_quantised_decoding() -> None:
    one = model()
    latents = one.encode(images()).latents
    codes = one.quantise.codebook()[one.indices(latents)].permute(0, 3, 1, 2)
    snapped, raw = one.decode(latents), one.decode(codes, force_not_quantize=True)
    assert torch.allclose(snapped.sample, raw.sample, atol=1e-6)
    assert raw.commit_loss.item() == 0
    assert raw.indices is None


def test_forward_is_encoding_and_decoding() -> None:
    one = model()
    whole = one(images())
    encoded = one.encode(images()).latents
    decoded = one.decode(encoded)
    assert torch.equal(whole.latents, encoded)
    assert torch.equal(whole.indices, decoded.indices)
    assert torch.allclose(whole.sample, decoded.sample, atol=1e-6)
    assert whole.commit_loss.item() == pytest.approx(decoded.commit_loss.item(), rel=1e-5)
    first, second, *_ = one(images(), return_dict=False)
    assert torch.equal(first, whole.sample)
    assert torch.equal(second, whole.commit_loss)


def test_the_interface_is_that_of_vqmodel() -> None:
    theirs = VQModel(
        block_out_channels=(8,), latent_channels=4, num_vq_embeddings=8, norm_num_groups=4
    )
    for one, pixels in ((model(), images()), (theirs.eval(), images(size=8))):
        encoded: Any = one.encode(pixels)
        (same,) = one.encode(pixels, return_dict=False)
        assert torch.equal(encoded.latents, same)
        for raw in (False, True):
            decoded: Any = one.decode(encoded.latents, force_not_quantize=raw)
            sample, _ = one.decode(encoded.latents, force_not_quantize=raw, return_dict=False)
            assert torch.equal(decoded.sample, sample)
            assert decoded.sample.shape == pixels.shape
        assert one(pixels).sample.shape == pixels.shape


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3, 20, 20\), the model takes \(B, 3, 16, 16\)"):
        model().encode(images(size=20))
    with pytest.raises(ValueError, match=r"takes \(B, 3, 16, 16\)"):
        model()(images(channels=1))


# -- as a model of diffusers -----------------------------------------------------------------------


def test_the_weights_come_from_torchs_generator() -> None:
    one, same, other = model(), model(), seeded(1, lambda: ViTVQModel(**TINY))
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.to_code.weight, other.to_code.weight)


@pytest.mark.parametrize("low_memory", [False, True])
def test_saving_and_loading(tmp_path: Path, low_memory: bool) -> None:
    one = model()
    one.quantise.observe(torch.tensor([1, 2, 2]))
    one.register_to_config(scaling_factor=4.25)
    one.save_pretrained(tmp_path)
    again: Any = ViTVQModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory)
    assert again.config.scaling_factor == 4.25
    assert one.state_dict().keys() == again.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(one(images()).sample, again.eval()(images()).sample)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_half_precision_weights_keep_whole_counts(tmp_path: Path) -> None:
    one = model()
    one.quantise.observe(torch.tensor([1, 2, 2]))
    half = one.to(torch.bfloat16)
    assert half.quantise.idle.dtype == torch.int64
    pixels = images().bfloat16()
    assert half.encode(pixels).latents.dtype == torch.bfloat16
    assert half.decode(half.encode(pixels).latents).sample.dtype == torch.bfloat16


class _Pipeline(DiffusionPipeline):
    def __init__(self, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)


def test_a_saved_pipeline_loads_it(tmp_path: Path) -> None:
    _Pipeline(model(), DDPMScheduler()).save_pretrained(tmp_path)
    loaded: Any = _Pipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.vae, ViTVQModel)
    assert torch.equal(loaded.vae(images()).sample, model()(images()).sample)
    # diffusers looks these names up in the module of a component
    assert vit_vq.ModelMixin is ModelMixin
    assert vit_vq.ConfigMixin is ConfigMixin


# -- losses ----------------------------------------------------------------------------------------


def test_logit_laplace_is_the_negative_log_density_up_to_a_constant() -> None:
    """Against the density of the law, obtained by transforming torch's Laplace by the sigmoid."""
    target, ours = images(2, 5), images(2, 5, seed=1)

    def squeeze(x: Tensor) -> Tensor:
        return 0.8 * (x.double() + 1) / 2 + 0.1

    def density(centre: Tensor) -> Tensor:
        law = torch.distributions.TransformedDistribution(
            torch.distributions.Laplace(torch.logit(squeeze(centre)), 1.0),
            [torch.distributions.SigmoidTransform()],
        )
        return -law.log_prob(squeeze(target)).mean()

    expected = density(ours) - density(target)  # a perfect reconstruction has loss 0
    assert logit_laplace_loss(ours, target).item() == pytest.approx(expected.item(), rel=1e-5)
    assert logit_laplace_loss(target, target).item() == 0


def test_logit_laplace_stays_finite_far_outside_the_range() -> None:
    far = torch.tensor([[-50.0, 50.0, 1.2, -1.2]]).requires_grad_()
    loss = logit_laplace_loss(far, torch.zeros(1, 4))
    loss.backward()
    assert math.isfinite(loss.item())
    assert far.grad is not None
    assert far.grad.isfinite().all()


def test_psnr_of_a_known_error() -> None:
    """An error of 0.1 of the pixels' range is 20 dB."""
    zeros = torch.zeros(2, 3, 4, 4)
    assert psnr(squared_errors(zeros + 0.2, zeros)).tolist() == pytest.approx([20.0, 20.0])
    assert psnr(squared_errors(zeros + 9.0, zeros + 0.98)[:1]).item() == pytest.approx(40.0, 1e-4)


def test_adversarial_losses_are_cross_entropies() -> None:
    real, fake = torch.tensor([0.3, -2.0, 40.0]), torch.tensor([-0.7, 1.0, -30.0])
    entropy = nn.functional.binary_cross_entropy_with_logits
    expected = entropy(real, torch.ones(3)) + entropy(fake, torch.zeros(3))
    assert discriminator_loss(real, fake).item() == pytest.approx(expected.item())
    assert generator_loss(fake).item() == pytest.approx(entropy(fake, torch.ones(3)).item())


def test_r1_is_the_squared_gradient_at_the_images() -> None:
    weight = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))

    class Quadratic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (weight * x * x).flatten(1).sum(1) / 2

    pixels = images(5, 4)
    expected = (weight * pixels).square().flatten(1).sum(1).mean()
    assert r1_penalty(Quadratic(), pixels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_r1_trains_the_critic() -> None:
    critic = seeded(0, lambda: Discriminator(16, width=4))
    r1_penalty(critic, images(4)).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())


def test_the_critic_learns_to_tell_and_sees_sameness() -> None:
    critic = seeded(0, lambda: Discriminator(16, width=4))
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    for step in range(60):
        real = images(8, seed=step)
        fake = images(1, seed=1000 + step).expand(8, -1, -1, -1)  # each alone is like a real one
        loss = discriminator_loss(critic(real), critic(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = critic(images(8, seed=5000)), critic(images(1, seed=6000).expand(8, -1, -1, -1))
    assert real.shape == (8,)
    assert real.min() > fake.max()


@pytest.mark.parametrize("resolution", [31, 36, 2 * 9])
def test_resolutions_that_cannot_be_halved(resolution: int) -> None:
    with pytest.raises(ValueError, match=f"resolution of {resolution}"):
        Discriminator(resolution, width=4)


@pytest.mark.parametrize("resolution", [8, 20, 24, 28, 32])
def test_resolutions_that_can(resolution: int) -> None:
    assert Discriminator(resolution, width=2)(images(2, resolution)).shape == (2,)


# -- the perceptual distance -----------------------------------------------------------------------


class _Features(nn.Module):
    """Hidden states that a test can compute: the pixels themselves, twice as many channels."""

    def forward(self, pixel_values: Tensor, output_hidden_states: bool) -> Any:
        tokens = pixel_values.flatten(2).transpose(1, 2)

        class Output:
            hidden_states = (pixel_values, pixel_values, torch.cat([tokens, 2 * tokens], -1))

        return Output


def test_perceptual_distance_is_the_mean_squared_distance_of_unit_features() -> None:
    distance = PerceptualDistance(_Features(), 6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    first, second = images(2, 6, seed=1), images(2, 6, seed=2)

    def unit(x: Tensor) -> Tensor:
        y = ((x + 1) / 2 - distance.mean) / distance.std
        return y / y.norm(dim=1, keepdim=True)

    # [t, 2t] / |[t, 2t]| is at the same distance as t / |t|
    expected = (unit(first) - unit(second)).square().sum(1).mean()
    assert distance(first, second).item() == pytest.approx(expected.item(), rel=1e-4)
    assert distance(first, first).item() == 0


def _saved(tmp_path: Path, kind: str) -> Path:
    import transformers as t

    networks: dict[str, Any] = {
        "dinov2": lambda: t.Dinov2Model(
            t.Dinov2Config(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28
            )
        ),
        "resnet": lambda: t.ResNetModel(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        ),
        "bert": lambda: t.BertModel(
            t.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        ),
    }
    seeded(0, networks[kind]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("kind", "size"), [("dinov2", 28), ("resnet", 224)])
def test_any_vision_model_of_transformers_serves(tmp_path: Path, kind: str, size: int) -> None:
    distance = PerceptualDistance.from_pretrained(str(_saved(tmp_path, kind)))
    assert distance.size == size
    ours = images(1).requires_grad_()
    value = distance(ours, images(1, seed=1))
    value.backward()
    assert value.item() > 0
    assert ours.grad is not None
    assert ours.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in distance.parameters())


def test_its_pixels_are_as_the_model_wants_them(tmp_path: Path) -> None:
    folder = _saved(tmp_path, "resnet")
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.6, 0.7], "image_std": [0.1, 0.2, 0.3], "size": {"height": 32, '
        '"width": 32}, "image_processor_type": "ConvNextImageProcessor"}'
    )
    distance = PerceptualDistance.from_pretrained(str(folder))
    assert distance.mean.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert distance.std.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert distance.size == 32


def test_a_perceptual_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a BertModel, which takes no images.*dinov2"):
        PerceptualDistance.from_pretrained(str(_saved(tmp_path / "bert", "bert")))
    with pytest.raises(ValueError, match=r"nowhere' cannot be loaded .*safetensors weights"):
        PerceptualDistance.from_pretrained(str(tmp_path / "nowhere"))
