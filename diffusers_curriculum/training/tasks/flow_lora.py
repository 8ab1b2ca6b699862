"""An adapter in a flow-matching transformer: the other half of the flow script."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers_curriculum.training.tasks.flow import FlowTransformer
from diffusers_curriculum.training.tasks.text_to_image_lora import AdapterTask


class FlowAdapter(AdapterTask, FlowTransformer):
    """An adapter in the transformer of any family of flow matching."""


def flow_task(argv: Sequence[str] | None = None) -> FlowTransformer:
    """The task of a command line: an adapter with --use_lora, else the whole transformer."""
    args = FlowTransformer.command_line.read(argv)
    return FlowAdapter() if args.use_lora else FlowTransformer()
