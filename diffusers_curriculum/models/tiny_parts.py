"""Small but real parts of pipelines, of random weights, from configs alone.

Families of models import it, and classes of libraries are looked up where they are needed, as most
runs need few of them.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any, cast

import diffusers
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from diffusers_curriculum.models.tiny import caption_tokenizer, tokenizer_of_pairs

WIDTH = 16  # of every embedding of a token
CHANNELS = 4  # of latents
CAPTION = "a photo of a red bird"
# positions in text and image; newer transformers call them rope_parameters, and take the old name
ROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}, "rope_theta": 1e6}
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def autoencoder(kind: Any = None, **settings: Any) -> Any:
    """An autoencoder of 2 pixels for a latent, along one side; by default an AutoencoderKL."""
    made: Any = kind or diffusers.AutoencoderKL
    return made(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        **settings,
    )


def film_autoencoder() -> diffusers.AutoencoderKLQwenImage:
    """An autoencoder of films, of 2 pixels for a latent, along one side."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[0.5, 0.8, 1.2, 1.0],
    )


def clip_tokenizer() -> Any:
    """A tokenizer of 77 tokens that knows all bytes."""
    return caption_tokenizer([CAPTION], max_length=77)


def clip(kind: Any, tokenizer: Any) -> Any:
    """A CLIP text encoder for the tokens of ``tokenizer``."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def t5_tokenizer() -> Any:
    """A tokenizer of letters and digits. It is made by a file, which transformers 4 and 5 read
    alike."""
    letters = "\u2581abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((c, -3.0) for c in letters)]
    tokenizer: Any = Tokenizer(Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    with TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        fast = cast(Any, transformers).T5TokenizerFast  # in 5 another name of T5Tokenizer
        file = {"tokenizer_file": f"{folder}/tokenizer.json"}
        return fast(**file, extra_ids=0, model_max_length=512)


def t5(width: int = WIDTH) -> transformers.T5EncoderModel:
    """A T5 encoder for the tokens of :func:`t5_tokenizer`."""
    config = transformers.T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config)


def qwen_tokenizer() -> Any:
    """A tokenizer of bytes and the marks of a chat."""
    words, marks = (*_MARKS, *sorted(ByteLevel.alphabet())), [*_MARKS[1:]]
    tokenizer = tokenizer_of_pairs(
        "Qwen2", words, [], additional_special_tokens=marks, model_max_length=2048
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def qwen3(kind: Any, layers: int = 2) -> Any:
    """A Qwen 3 for the tokens of :func:`qwen_tokenizer`."""
    settings: dict[str, Any] = _language() | {"num_hidden_layers": layers, "head_dim": 8}
    return kind(transformers.Qwen3Config(**settings, pad_token_id=0))


def qwen_vl() -> transformers.Qwen2_5_VLForConditionalGeneration:
    """A Qwen 2.5 VL for the tokens of :func:`qwen_tokenizer`; what it sees with is smallest."""
    sight: dict[str, Any] = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}
    marks = ("vision_start", "vision_end", "vision", "image", "video")
    settings: dict[str, Any] = {f"{n}_token_id": 259 + at for at, n in enumerate(marks)}
    settings["text_config"] = _language() | ROPE
    settings["vision_config"] = sight | {"out_hidden_size": WIDTH, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(**settings)
    )


def _language() -> dict[str, Any]:
    return {
        "vocab_size": 264,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
    }
