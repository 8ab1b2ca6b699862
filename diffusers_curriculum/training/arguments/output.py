"""Flags of what a run leaves: its folder, trackers, the Hub."""

from __future__ import annotations

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.flag import Family, Flag, Need, choice, place, tracked

HUB_STRATEGIES = ("end", "every_save")

_PUSHED = Need("--push_to_hub", lambda a: a.push_to_hub)

OUTPUT = Family.of(
    "output",
    place("output_dir", "trained-model", "folder of all results"),
    tracked(
        "overwrite_output_dir", help="move a run that is in --output_dir aside, and begin anew"
    ),
    place("logging_dir", "logs", "folder of tracker files, in --output_dir"),
    tracked("report_to", str, "tensorboard", "tracker, all, or none"),
    tracked("tracker_project_name", str, "training", "project name at the tracker"),
    check_machine=environment.check_output,
)
HUB = Family.of(
    "output",
    tracked("push_to_hub", help="upload the pipeline at the end"),
    choice(
        "hub_strategy",
        HUB_STRATEGIES,
        "end",
        "upload at the end only, or also with every checkpoint: the pipeline as it is then, and "
        "the checkpoint, for --resume_from_checkpoint hub:OWNER/NAME",
        needs=(_PUSHED,),
    ),
    tracked("hub_private_repo", help="create the repository as a private one", needs=(_PUSHED,)),
    Flag("hub_token", str, help="token for the upload; never stored. Prefer `hf auth login`"),
    tracked("hub_model_id", str, help="repository to upload to (default: name of --output_dir)"),
    tracked("license", str, help="licence on the model card (default: that of the base model)"),
    check=environment.check_token,
    check_machine=environment.check_hub,
)
