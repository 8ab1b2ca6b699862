"""The command line of diffusers' official train_unconditional.py, flag by flag.

Names, types, defaults and choices are its interface, so that existing launch commands run as they
are; --prediction_type takes v_prediction besides.
"""

from __future__ import annotations

import argparse

from diffusers_curriculum.training.arguments.official import add_checkpoint_arguments


def add_official_unconditional(parser: argparse.ArgumentParser) -> None:
    """Add the 45 flags of the official unconditional script."""
    for add in (
        _add_model_and_data,
        _add_run,
        _add_optimizer,
        _add_average,
        _add_process,
        _add_output,
        add_checkpoint_arguments,
    ):
        add(parser)


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and data").add_argument
    add(
        "--model_config_name_or_path",
        type=str,
        help="network to train: a config (file, folder, Hub repository), or DiT-S/2 ... DiT-XL/8 "
        "(default: the U-Net of DDPM)",
    )
    add("--dataset_name", type=str, help="data set on the Hub, or one that datasets can load")
    add("--dataset_config_name", type=str, help="configuration of that data set")
    add("--train_data_dir", type=str, help="folder of images")
    add("--cache_dir", type=str, help="folder for downloaded models and data sets")
    add("--resolution", type=int, default=64, help="side of the training images")
    add("--center_crop", action="store_true", help="crop the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror each image with probability 1/2")
    add("--dataloader_num_workers", type=int, default=0, help="processes that load images")
    add(
        "--preserve_input_precision",
        action="store_true",
        help="keep 16-bit images at their precision instead of 8 bits",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--train_batch_size", type=int, default=16, help="images per device and micro-batch")
    add("--eval_batch_size", type=int, default=16, help="pictures drawn")
    add("--num_epochs", type=int, default=100, help="passes over the data")
    add("--save_images_epochs", type=int, default=10, help="epochs between pictures")
    add("--save_model_epochs", type=int, default=10, help="epochs between copies of the pipeline")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step")
    add("--local_rank", type=int, default=-1, help="set by the launcher; LOCAL_RANK overrides it")
    add(
        "--mixed_precision",
        type=str,
        default="no",
        choices=["no", "fp16", "bf16"],
        help="number format of the forward pass",
    )
    add(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="attention by xformers (needs a CUDA device)",
    )


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=float, default=1e-4, help="learning rate after warm-up")
    add("--lr_scheduler", type=str, default="cosine", help="course of the learning rate")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps of warm-up")
    add("--adam_beta1", type=float, default=0.95, help="decay of the first moment")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=float, default=1e-6, help="decoupled weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="added to the denominator")


def _add_average(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("moving average").add_argument
    add("--use_ema", action="store_true", help="average the weights, and use the average")
    add("--ema_inv_gamma", type=float, default=1.0, help="inverse gamma of the average's warm-up")
    add("--ema_power", type=float, default=3 / 4, help="power of the average's warm-up")
    add("--ema_max_decay", type=float, default=0.9999, help="largest decay of the average")


def _add_process(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("variance preserving process").add_argument
    add(
        "--prediction_type",
        type=str,
        default="epsilon",
        choices=["epsilon", "sample", "v_prediction"],
        help="what the network predicts",
    )
    add("--ddpm_num_steps", type=int, default=1000, help="number of noise levels")
    add("--ddpm_num_inference_steps", type=int, default=1000, help="denoising steps per picture")
    add("--ddpm_beta_schedule", type=str, default="linear", help="course of the noise")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=str, default="ddpm-model-64", help="folder of all results")
    add(
        "--overwrite_output_dir",
        action="store_true",
        help="accepted and without effect, as officially: results never mix with older ones",
    )
    add(
        "--logger",
        type=str,
        default="tensorboard",
        choices=["tensorboard", "wandb"],
        help="tracker of metrics and pictures",
    )
    add("--logging_dir", type=str, default="logs", help="folder of tracker files, in --output_dir")
    add("--push_to_hub", action="store_true", help="upload the pipeline at the end")
    add("--hub_token", type=str, help="token for the upload; never stored. Prefer `hf auth login`")
    add("--hub_model_id", type=str, help="repository to upload to (default: name of --output_dir)")
    add("--hub_private_repo", action="store_true", help="create the repository as a private one")
