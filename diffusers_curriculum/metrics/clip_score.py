"""How well pictures fit their captions, by a CLIP model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffusers_curriculum.metrics.preprocessing import FeatureNetworkError
from diffusers_curriculum.metrics.vision_models import find_preprocessing, first_line, local_folder
from diffusers_curriculum.models.loading import load_whole


class ClipScore:
    """CLIPScore without its factor of 2.5: the mean of max(100 cos(E_I, E_C), 0) over pictures and
    their captions (arXiv 2104.08718, section 3.1).

    Args:
        name: a folder that save_pretrained wrote, with the tokenizer and preprocessor_config.json
            beside the model, or a repository on the Hub.

    Raises:
        FeatureNetworkError: it cannot be loaded; the message says what is missing.
    """

    def __init__(self, name: str) -> None:
        import transformers  # here, as few ask for it

        folder = local_folder(name)
        source = name if folder is None else str(folder)
        try:
            model, _ = load_whole(transformers.CLIPModel, source)
            self.tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(source)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise FeatureNetworkError(
                f"the CLIP model {name} cannot be loaded ({first_line(error)}). Give one with "
                "safetensors weights and its tokenizer, such as openai/clip-vit-large-patch14."
            ) from error
        self.preprocessing = find_preprocessing(name, folder, model.config.vision_config)
        self.model: Any = model.float().eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image], captions: Sequence[str], device: torch.device | str = "cpu"
    ) -> float:
        """The score of pictures, a caption for each, computed on a device; the model is on the host
        before and after. A caption that is too long for it is cut."""
        tokens = self.tokenizer(
            list(captions),
            max_length=self.model.config.text_config.max_position_embeddings,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(device)
        pixels = [self.preprocessing(_pixels(image)[None].to(device)) for image in images]
        self.model.to(device)
        # mixed precision of the training must not reach in here
        with torch.autocast(torch.device(device).type, enabled=False):
            seen = self.model(**tokens, pixel_values=torch.cat(pixels))
        self.model.to("cpu")
        cosines = cosine_similarity(seen.image_embeds.double(), seen.text_embeds.double())
        return float((100 * cosines).clamp(min=0).mean())


def _pixels(image: Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
