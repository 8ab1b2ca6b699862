"""A small but real Stable Diffusion pipeline, built from configs and saved as any other."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.functional import mse_loss
from tqdm.auto import tqdm

from diffusers_curriculum.models.image_folder import TinyModelError, read_images
from diffusers_curriculum.models.saving import share_weights

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VAE_STEPS = 250  # enough for the scans of the demos
LARGEST_SIDE = 1024  # pixels: all images are read at once
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TinySizes:
    """Widths of the parts; the autoencoder halves the image once per entry after its first."""

    vae_channels: tuple[int, ...] = (16, 32, 32, 32)
    unet_channels: tuple[int, ...] = (32, 64)
    latent_channels: int = 4
    text_width: int = 32
    text_length: int = 16
    groups: int = 8

    @property
    def downsampling(self) -> int:
        """Return image pixels per latent pixel, along one side."""
        return 2 ** (len(self.vae_channels) - 1)


MINUSCULE = TinySizes((8, 8), (8, 16), text_width=16, groups=4)


@dataclass(frozen=True)
class TinyReport:
    """What was built: the folder, the measured scale of the latents and the autoencoder's error."""

    output_dir: Path
    images: int
    scaling_factor: float
    reconstruction_error: float


def make_tiny_pipeline(
    images_dir: str | Path | None,
    output_dir: str | Path,
    *,
    resolution: int = 32,
    vae_steps: int | None = None,
    seed: int = 0,
    sizes: TinySizes | None = None,
    prediction_type: str = "epsilon",
    progress: bool = False,
) -> TinyReport:
    """Build a StableDiffusionPipeline from configs, train its autoencoder briefly, save it.

    `scaling_factor` is 1 / std of the latents, measured. The U-Net and the text encoder stay
    random. The caller's global random state is left as it was.

    Args:
        images_dir: an image folder; captions come from its `metadata.jsonl` (`file_name`, `text`),
            and the tokenizer's words from them. None: random weights throughout.
        vae_steps: training steps of the autoencoder, 32 images each; by default 250 where there are
            images.
        progress: show a bar while it trains.

    Raises:
        TinyModelError: sizes that do not divide, a folder without images, broken metadata.
    """
    sizes = sizes or TinySizes()
    if vae_steps is None:
        vae_steps = 0 if images_dir is None else VAE_STEPS
    _check(images_dir, resolution, vae_steps, sizes, prediction_type)
    if not 0 <= seed < 2**63:
        raise TinyModelError(f"seed={seed} is out of range: take 0 to 2**63 - 1")
    if Path(output_dir).is_file():
        raise TinyModelError(f"{str(output_dir)!r} is a file: give a folder to save in")
    generator = torch.Generator().manual_seed(seed)
    images, captions = read_images(images_dir, resolution, generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        tokenizer = caption_tokenizer(captions, max_length=sizes.text_length)
        text_encoder = _text_encoder(tokenizer, sizes)
        unet = _unet(resolution, sizes)
        vae = _autoencoder(resolution, sizes)
    error = train_autoencoder(vae, images, vae_steps, generator, progress)
    scale = 1.0 / float(encode_images(vae, images, generator).std())
    vae.register_to_config(scaling_factor=scale)
    parts: dict[str, Any] = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    parts |= {"unet": unet, "scheduler": _scheduler(prediction_type)}
    parts |= {"safety_checker": None, "feature_extractor": None}
    diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(
        output_dir
    )
    share_weights(output_dir, "*/*.safetensors")
    report = TinyReport(Path(output_dir), len(captions), scale, error)
    logger.info("Saved a tiny pipeline: %s", report)
    return report


def _check(images: Any, resolution: int, vae_steps: int, sizes: TinySizes, kind: str) -> None:
    """Raise TinyModelError for the first setting that cannot work."""
    smallest = sizes.downsampling * 2 ** (len(sizes.unet_channels) - 1)
    if not 8 <= resolution <= LARGEST_SIDE or resolution % 8 or resolution % smallest:
        raise TinyModelError(
            f"resolution={resolution} does not fit: take a positive multiple of {max(8, smallest)} "
            f"up to {LARGEST_SIDE}"
        )
    if vae_steps < 0:
        raise TinyModelError(f"vae_steps={vae_steps} is negative: take 0 (no training) or more")
    if images is None and vae_steps:
        raise TinyModelError(f"vae_steps={vae_steps} needs images: give a folder, or take 0 steps")
    if kind not in PREDICTION_TYPES:
        known = ", ".join(PREDICTION_TYPES)
        raise TinyModelError(f"prediction_type={kind!r} is unknown: take one of {known}")


def _text_encoder(
    tokenizer: transformers.CLIPTokenizer, sizes: TinySizes
) -> transformers.CLIPTextModel:
    """Return a random CLIP text encoder: a fixed random embedding of the caption's tokens."""
    vocabulary = tokenizer.get_vocab()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_width,
        intermediate_size=2 * sizes.text_width,
        projection_dim=sizes.text_width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=sizes.text_length,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    encoder = transformers.CLIPTextModel(config)
    # CLIP starts its embeddings at 0.02, which the random layers above drown: untrained, captions
    # that differ in one word would look nearly alike to the U-Net.
    torch.nn.init.normal_(next(encoder.get_input_embeddings().parameters()), std=1.0)
    return encoder.eval()


def _autoencoder(resolution: int, sizes: TinySizes) -> diffusers.AutoencoderKL:
    """Return a random AutoencoderKL with Stable Diffusion's layout."""
    channels: Any = sizes.vae_channels  # diffusers annotates tuples as if they had one entry
    down: Any = ("DownEncoderBlock2D",) * len(channels)
    up: Any = ("UpDecoderBlock2D",) * len(channels)
    return diffusers.AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=channels,
        latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.groups,
        sample_size=resolution,
    )


def _unet(resolution: int, sizes: TinySizes) -> diffusers.UNet2DConditionModel:
    """Return a random U-Net with Stable Diffusion's layout: text enters all levels but one."""
    plain = len(sizes.unet_channels) - 1
    return diffusers.UNet2DConditionModel(
        sample_size=resolution // sizes.downsampling,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * plain + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * plain,
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=4,
        norm_num_groups=sizes.groups,
    )


def _scheduler(prediction_type: Any) -> diffusers.DDPMScheduler:
    """Return Stable Diffusion's own noise schedule."""
    return diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


# -- the autoencoder's brief training --------------------------------------------------------------


def train_autoencoder(
    vae: diffusers.AutoencoderKL,
    images: torch.Tensor,
    steps: int,
    generator: torch.Generator,
    progress: bool = False,
) -> float:
    """Train `vae` on `images` (n, 3, h, w) in [-1, 1]; return the last steps' mean squared error.

    Minimises `mean (x - decode(z))^2 + 1e-4 mean KL(q(z | x) || N(0, 1))`, both means per element;
    learning rate on one cosine arch, so that a few hundred steps are enough.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=0.0)
    arch = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 2))
    recent: list[float] = []
    vae.train()
    for _ in tqdm(range(steps), "Training the autoencoder", disable=not (progress and steps)):
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        posterior = vae.encode(batch, return_dict=False)[0]
        latents: Any = posterior.sample(generator)  # decode is annotated for a FloatTensor
        error = mse_loss(vae.decode(latents, return_dict=False)[0], batch)
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        optimizer.zero_grad()
        (error + 1e-4 * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        arch.step()
        recent = [*recent[-19:], float(error.detach())]
    vae.eval()
    return sum(recent) / len(recent) if recent else float("nan")


@torch.no_grad()
def encode_images(
    vae: diffusers.AutoencoderKL, images: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return unscaled latents (n, c, h', w'), one posterior draw per image."""
    posteriors = [vae.encode(batch, return_dict=False)[0] for batch in images.split(128)]
    return torch.cat([posterior.sample(generator) for posterior in posteriors])


# -- a CLIP tokenizer made from captions, without any download -------------------------------------


def caption_tokenizer(
    captions: Iterable[str], *, max_length: int, vocabulary_size: int = 1024
) -> transformers.CLIPTokenizer:
    """Return a CLIPTokenizer for which each frequent word of the captions is one token.

    Words are merged left to right, most frequent first, while `vocabulary_size` has room. All
    bytes are in the vocabulary, so any other text can be encoded too.
    """
    alphabet = sorted(ByteLevel.alphabet())  # of the characters that stand for bytes in CLIP's BPE
    vocabulary = [*alphabet, *(char + "</w>" for char in alphabet)]
    known, merges = set(vocabulary), []
    room = vocabulary_size - len(vocabulary) - 2
    for word in _frequent_words(captions, max_length):
        steps = [(left, right) for left, right in _merge_steps(word) if left + right not in known]
        if len(steps) > room - len(merges):
            continue
        merges += steps
        known.update(left + right for left, right in steps)
    vocabulary += [left + right for left, right in merges] + [START, END]
    return tokenizer_of_pairs("CLIP", vocabulary, merges, model_max_length=max_length)


def tokenizer_of_pairs(
    kind: str, vocabulary: Sequence[str], merges: Iterable[tuple[str, str]], **settings: Any
) -> Any:
    """Return a tokenizer by byte pairs, of a kind that transformers has ("CLIP", "Qwen2"). It is
    made by files, which transformers 4 and 5 read alike."""
    with TemporaryDirectory() as folder:
        vocab, lines = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
        lines.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", "utf-8")
        fast = getattr(transformers, f"{kind}TokenizerFast")  # in 5 another name of the other one
        return fast(str(vocab), str(lines), **settings)


def _frequent_words(captions: Iterable[str], max_length: int) -> list[str]:
    """Return the distinct words of the captions, most frequent first, ties by alphabet."""
    splitter = tokenizer_of_pairs("CLIP", [START, END], []).backend_tokenizer
    counts: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        text = splitter.normalizer.normalize_str(caption)
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(text):
            counts[word] += times
    return sorted(counts, key=lambda word: (-counts[word], word))


def _merge_steps(word: str) -> list[tuple[str, str]]:
    """Return the pairs that grow `word` by one character each, the last one marked `</w>`."""
    parts = [*word[:-1], word[-1] + "</w>"]
    return [("".join(parts[:i]), parts[i]) for i in range(1, len(parts))]
