"""Pictures and weights of a run that trains an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusers_curriculum.training.publish.card import CardFacts, shown_name
from diffusers_curriculum.training.publish.text_to_image import OnePromptPublisher

INFERENCE_STEPS = 30  # as in diffusers' train_text_to_image_lora.py
_LOADED = """\
```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base}, torch_dtype=torch.float16)
pipeline.load_lora_weights({repo_id})"""
_DRAWN = """
image = pipeline(prompt={prompt}).images[0]
image.save("image.png")
```"""
# A file of an adapter holds no scheduler.
_PREDICTING = """
pipeline.scheduler = pipeline.scheduler.from_config(
    pipeline.scheduler.config, prediction_type="{kind}"
)"""


class AdapterPublisher(OnePromptPublisher):
    """Publishes the weights of an adapter."""

    steps = INFERENCE_STEPS

    @property
    def network(self) -> Any:
        return self.models.network

    def _save(self, folder: Path) -> Callable[[], Any]:
        named = partial(self.family.kohya_name, network=self.network.config)
        kohya = named if self.args.save_format == "kohya" else None
        self.averages.network.save_pretrained(folder, kohya)
        return self._validation_pipeline

    def _facts(self) -> CardFacts:
        facts, args = super()._facts(), self.args
        own = self.levels.inference.config.get("prediction_type", self._prediction_type)
        other = (
            "" if own == self._prediction_type else _PREDICTING.format(kind=self._prediction_type)
        )
        adapter = {"Rank": args.rank, "Alpha": args.lora_alpha}
        adapter |= {"Trained modules": ", ".join(args.lora_target_modules)}
        if args.of_setting("adapter").get("train_text_encoder"):
            adapter["Text encoders"] = "trained by adapters, too"
        if autoencoder := args.of_setting("model").get("pretrained_vae_model_name_or_path"):
            adapter["Autoencoder"] = shown_name(autoencoder)
        return replace(
            facts,
            title="LoRA weights",
            usage=_LOADED + other + _DRAWN,
            tags=(*facts.tags, "lora"),
            training=adapter | dict(facts.training),
            versions=dict(facts.versions) | {"peft": metadata.version("peft")},
        )
