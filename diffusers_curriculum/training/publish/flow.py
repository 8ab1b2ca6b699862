"""Pictures and pipeline of a run on a flow-matching transformer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers_curriculum.training.process.runtime import frozen_dtype
from diffusers_curriculum.training.publish.text_to_image import OnePromptPublisher


class FlowPublisher(OnePromptPublisher):
    """Publishes the pipeline of a family of flow matching."""

    def _validation_pipeline(self) -> Any:
        """Around the models in memory; text encoders that were freed are read again, for now."""
        if self.models.encoders:
            return super()._validation_pipeline()
        family, dtype = self.family, frozen_dtype(self.accelerator)
        read = {name: family.load_part(self.args, name, dtype) for name in family.encoders}
        models = replace(self.models, encoders=read)
        return family.pipeline_of(models, self.network, self._scheduler())
