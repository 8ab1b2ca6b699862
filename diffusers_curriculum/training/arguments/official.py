"""The command line of diffusers' official train_text_to_image.py, flag by flag.

Names, types, defaults and choices are its interface, so that existing launch commands run as they
are. One function per family, so that other entries can take the families they share.
"""

from __future__ import annotations

import argparse

IMAGE_INTERPOLATION_MODES = (
    "bicubic",
    "bilinear",
    "box",
    "hamming",
    "lanczos",
    "nearest",
    "nearest_exact",
)


def add_official_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the 57 flags of the official text-to-image script."""
    for add in (
        add_model_arguments,
        add_data_arguments,
        add_run_arguments,
        add_optimizer_arguments,
        add_objective_arguments,
        add_ema_arguments,
        add_validation_arguments,
        add_precision_arguments,
        add_output_arguments,
        add_checkpoint_arguments,
    ):
        add(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pipeline to start from."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained_model_name_or_path",
        type=str,
        required=True,
        help="pipeline to fine-tune: a repository on the Hub or a local folder",
    )
    add("--revision", type=str, help="branch, tag or commit of that repository")
    add("--variant", type=str, help="variant of its weight files, such as fp16")
    add("--non_ema_revision", type=str, help="deprecated: revision of the UNet; see --variant")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where images and captions come from, and how images are cut."""
    group = parser.add_argument_group("data")
    add_source_arguments(group)
    group.add_argument(
        "--caption_column", type=str, default="text", help="column with the captions"
    )
    add_image_arguments(group)


def add_source_arguments(group: argparse._ArgumentGroup) -> None:
    """Which images, from where."""
    add = group.add_argument
    add("--dataset_name", type=str, help="data set on the Hub, or one that datasets can load")
    add("--dataset_config_name", type=str, help="configuration of that data set")
    add("--train_data_dir", type=str, help="image folder; captions stand in its metadata file")
    add("--image_column", type=str, default="image", help="column with the images")
    add("--max_train_samples", type=int, help="train on that many samples only, chosen by the seed")
    add("--cache_dir", type=str, help="folder for downloaded models and data sets")


def add_image_arguments(group: argparse._ArgumentGroup) -> None:
    """How images are cut and read."""
    add = group.add_argument
    add("--resolution", type=int, default=512, help="side of the training images")
    add("--center_crop", action="store_true", help="crop the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror each image with probability 1/2")
    add(
        "--image_interpolation_mode",
        type=str,
        default="lanczos",
        choices=list(IMAGE_INTERPOLATION_MODES),
        help="filter used to resize images",
    )
    add("--dataloader_num_workers", type=int, default=0, help="processes that load images")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How long, how much at a time, from which seed."""
    add = parser.add_argument_group("run").add_argument
    add("--train_batch_size", type=int, default=16, help="images per device and micro-batch")
    add("--num_train_epochs", type=int, default=100, help="passes over the data")
    add("--max_train_steps", type=int, help="optimizer steps in all; overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step")
    add("--gradient_checkpointing", action="store_true", help="save memory, spend time: recompute")
    add("--seed", type=int, help="seed of every random draw")
    add("--local_rank", type=int, default=-1, help="set by the launcher; LOCAL_RANK overrides it")


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """AdamW and its learning rate."""
    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=float, default=1e-4, help="learning rate after warm-up")
    add("--scale_lr", action="store_true", help="multiply it by batch x accumulation x processes")
    add("--lr_scheduler", type=str, default="constant", help="course of the learning rate")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps of warm-up")
    add("--use_8bit_adam", action="store_true", help="keep AdamW's state in 8 bits (bitsandbytes)")
    add("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=float, default=1e-2, help="decoupled weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="added to the denominator")
    add("--max_grad_norm", type=float, default=1.0, help="longer gradients are cut to this norm")


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    """What is predicted and how noise is made."""
    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", type=str, help="what the network predicts (default: as its scheduler)")
    add("--snr_gamma", type=float, help="min-SNR loss weighting with this gamma; 5 is usual")
    add("--noise_offset", type=float, default=0, help="scale of noise shared by a channel")
    add("--input_perturbation", type=float, default=0, help="scale of noise on the input only")
    add("--dream_training", action="store_true", help="train with DREAM (arXiv 2312.00210)")
    add("--dream_detail_preservation", type=float, default=1.0, help="exponent p of DREAM")


def add_ema_arguments(parser: argparse.ArgumentParser) -> None:
    """The moving average of the weights."""
    add = parser.add_argument_group("moving average").add_argument
    add("--use_ema", action="store_true", help="average the weights, and use the average")
    add("--offload_ema", action="store_true", help="keep the average in host memory")
    add("--foreach_ema", action="store_true", help="update the average with fused operations")


def add_validation_arguments(parser: argparse.ArgumentParser) -> None:
    """Pictures made while training."""
    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompts", type=str, nargs="+", help="prompts drawn from time to time")
    add("--validation_epochs", type=int, default=5, help="epochs between validations")


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Number formats and kernels."""
    add = parser.add_argument_group("precision").add_argument
    add(
        "--mixed_precision",
        type=str,
        choices=["no", "fp16", "bf16"],
        help="number format of the forward pass (default: what accelerate is configured for)",
    )
    add("--allow_tf32", action="store_true", help="multiply float32 matrices in TF32")
    add(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="attention by xformers (needs a CUDA device)",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where results, metrics and uploads go."""
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=str, default="sd-model-finetuned", help="folder of all results")
    add("--logging_dir", type=str, default="logs", help="folder of tracker files, in --output_dir")
    add("--report_to", type=str, default="tensorboard", help="tracker, or all")
    add(
        "--tracker_project_name",
        type=str,
        default="text2image-fine-tune",
        help="project name at the tracker",
    )
    add("--push_to_hub", action="store_true", help="upload the pipeline at the end")
    add("--hub_token", type=str, help="token for the upload; never stored. Prefer `hf auth login`")
    add("--hub_model_id", type=str, help="repository to upload to (default: name of --output_dir)")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """When state is saved, how much is kept, and where to go on from."""
    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpointing_steps", type=int, default=500, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=int, help="checkpoints kept; older ones are deleted")
    add(
        "--resume_from_checkpoint",
        type=str,
        help="go on from here: latest, checkpoint-N in --output_dir, or any path",
    )
