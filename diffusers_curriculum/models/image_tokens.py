"""Predicts the codes of an image one after another: the second stage of ViT-VQGAN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from diffusers_curriculum.checks import whole


@dataclass
class ImageTokenOutput(BaseOutput):
    """Logits (B, n + 1, codebook_size), float32, of each code given those before it."""

    logits: Tensor


class ImageTokenTransformer(ModelMixin, ConfigMixin):
    """A causal language model of transformers over the codes of an image in raster order
    (arXiv 2110.04627, 4): p(codes | class) = prod_i p(code_i | class, code_0 ... code_i-1).

    The first token tells the class. Tokens are the codes, then the classes, then the null class,
    which stands for none: in images of any class, and in classifier-free guidance.

    Args:
        codebook_size: number of codes.
        num_positions: codes of an image.
        num_classes: 0 for images without classes.
        model_type: a causal language model of transformers, such as "gpt2" or "llama".
        model_args: settings of its config, such as n_layer, n_embd and n_head.

    Raises:
        ValueError: a number out of range, no such language model, or a setting that it has not.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["lm_head"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int,
        num_positions: int,
        num_classes: int = 0,
        model_type: str = "gpt2",
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        whole("codebook_size", codebook_size, 2, 2**20)
        whole("num_positions", num_positions, 1, 2**20)
        whole("num_classes", num_classes, 0, 2**20)
        vocabulary = codebook_size + num_classes + 1
        config = _language_model_config(model_type, model_args or {}, vocabulary, num_positions)
        self.causal_lm: Any = AutoModelForCausalLM.from_config(config)

    @property
    def null_class(self) -> int:
        """The label of images of any class."""
        return self.config["num_classes"]

    def forward(
        self, codes: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> ImageTokenOutput | tuple[Tensor]:
        """Predict the first n + 1 codes of images, given the first n, (B, n) int64.

        Args:
            class_labels: (B,) int64; None: the null class.
        """
        if class_labels is None:
            class_labels = self.no_class(codes)
        tokens = torch.cat([self.first_tokens(class_labels), codes], 1)
        logits = self._logits(self.causal_lm(input_ids=tokens, use_cache=False).logits)
        return ImageTokenOutput(logits=logits) if return_dict else (logits,)

    def first_tokens(self, class_labels: Tensor) -> Tensor:
        """The tokens (B, 1) that images of classes (B,) begin with."""
        return class_labels[:, None] + self.config["codebook_size"]

    def no_class(self, like: Tensor) -> Tensor:
        """The null class (B,) for each of B images."""
        return torch.full((len(like),), self.null_class, dtype=torch.int64, device=like.device)

    def following(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits (B, codebook_size) of the code after (B, n) more tokens, and the keys and values
        of all tokens so far, which the next call is given."""
        output = self.causal_lm(input_ids=tokens, past_key_values=cache, use_cache=True)
        return self._logits(output.logits[:, -1]), output.past_key_values

    def features(self, codes: Tensor, layer: int | None = None) -> Tensor:
        """Hidden states (B, D) of images (B, num_positions) after so many layers, by default half
        of them, averaged over the positions; nothing is told of classes (arXiv 2110.04627, 4.3)."""
        tokens = torch.cat([self.first_tokens(self.no_class(codes)), codes[:, :-1]], 1)
        output = self.causal_lm(input_ids=tokens, use_cache=False, output_hidden_states=True)
        states = output.hidden_states
        return states[len(states) // 2 if layer is None else layer].float().mean(1)

    def _logits(self, logits: Tensor) -> Tensor:
        return logits[..., : self.config["codebook_size"]].float()


def _language_model_config(
    kind: str, settings: dict[str, Any], vocabulary: int, length: int
) -> Any:
    """The config of a language model of ``vocabulary`` tokens and sequences of ``length``."""
    try:
        known = AutoConfig.for_model(kind)
    except ValueError:
        raise ValueError(
            f"model_type={kind!r} is none of transformers: give that of a causal language model, "
            "such as gpt2 or llama."
        ) from None
    own = {
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "tie_word_embeddings": False,  # classes are told, and not predicted
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    for name in settings:
        if name in own or not hasattr(known, name):
            why = "the codes decide that" if name in own else f"{kind} has no such setting"
            raise ValueError(f"model_args has {name}={settings[name]!r}, and {why}: drop it.")
    config = AutoConfig.for_model(kind, **settings)
    for name, value in own.items():
        setattr(config, name, value)
    return config
