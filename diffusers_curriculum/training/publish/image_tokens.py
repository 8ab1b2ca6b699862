"""Pictures, images for metrics, and the pipeline of runs on the codes of images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers_curriculum import pipelines
from diffusers_curriculum.models.latent_space import LatentSpace
from diffusers_curriculum.training.publish.card import CardFacts
from diffusers_curriculum.training.publish.images import ImagePublisher


class TokenPublisher(ImagePublisher):
    """Publishes what a model draws code by code; see :class:`ImagePublisher`."""

    def _check_sampling(self) -> None:
        """All that is told to draw was looked at with the command line."""

    def _drawing(self, purpose: str) -> dict[str, Any]:
        args = self.args
        told = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        return {name: value for name, value in told.items() if value is not None}

    def _validation_pipeline(self) -> Any:
        return self._final_pipeline(self._space())

    def _final_pipeline(self, space: LatentSpace | None = None) -> Any:
        space = space or (self.models and self.models.empty)
        autoencoder: Any = space and space.model
        return pipelines.ImageTokenPipeline(self.network, autoencoder, id2label=self.id2label)

    def _of_kind(self) -> dict[str, object]:
        network = self.models.network.config if self.models else {}
        return {"Language model": network.get("model_type"), "Codes": network.get("num_positions")}

    def _facts(self) -> CardFacts:
        facts = super()._facts()
        told = {name: value for name, value in facts.training.items() if name != "Prediction type"}
        return replace(facts, training=told | {"Trained on": "codes"})
