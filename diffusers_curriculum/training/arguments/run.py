"""Flags that every kind of training shares, named as in diffusers' scripts."""

from __future__ import annotations

import os
from typing import Any

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.flag import (
    COUNT,
    DECAY,
    NOT_NEGATIVE,
    SETTINGS,
    SHARE,
    Bound,
    Family,
    Flag,
    Need,
    path,
    tracked,
)
from diffusers_curriculum.training.errors import UsageError

# diffusers' names. `piecewise_constant` needs rules that no flag can give.
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact")
POLICIES = ("raise", "skip")  # for what is not finite, and for samples that cannot be used
MIXED_PRECISIONS = ("no", "fp16", "bf16")

_OF_A_DATA_SET = Need("--dataset_name", lambda a: a.dataset_name is not None)
_AVERAGED = Need("--use_ema", lambda a: a.use_ema)
_SKIPPING = Need("--bad_samples skip", lambda a: a.bad_samples == "skip")
_RESUMED = Need("--resume_from_checkpoint", lambda a: bool(a.resume_from_checkpoint))
_ABOVE_ZERO = Bound("greater than 0", lambda x: x > 0)
_CLIPPING = Bound("above 0 (inf: no clipping)", lambda x: x > 0)
_SEED = Bound("in [0, 2^32)", lambda x: 0 <= x < 2**32)


def settle_local_rank(args: Any) -> None:
    """Launchers say the rank by a variable, which overrides the flag.

    Raises:
        UsageError: it is no integer.
    """
    text = os.environ.get("LOCAL_RANK", "-1")
    try:
        rank = int(text)
    except ValueError:
        raise UsageError(
            f"the environment variable LOCAL_RANK is {text!r}: make it an integer or unset it."
        ) from None
    args.local_rank = args.local_rank if rank == -1 else rank


SOURCE = Family.of(
    "data",
    tracked(
        "dataset_name", str, help="data set on the Hub, or one that datasets can load", convert=path
    ),
    tracked(
        "dataset_config_name", str, help="configuration of that data set", needs=(_OF_A_DATA_SET,)
    ),
    tracked(
        "train_data_dir",
        str,
        help="image folder; captions stand in its metadata file",
        convert=path,
    ),
    tracked("image_column", str, "image", "column with the images"),
    tracked(
        "max_train_samples",
        int,
        help="train on that many samples only, chosen by the seed",
        bound=COUNT,
    ),
    Flag("cache_dir", str, help="folder for downloaded models and data sets", convert=path),
    setting="dataset",
)
IMAGES = Family.of(
    "data",
    tracked("resolution", int, 512, "side of the training images", bound=COUNT),
    tracked("center_crop", help="crop the middle instead of a random place"),
    tracked("random_flip", help="mirror each image with probability 1/2"),
    tracked(
        "image_interpolation_mode",
        str,
        "lanczos",
        "filter used to resize images",
        choices=INTERPOLATIONS,
    ),
    setting="images",
)
LOADING = Family.of(
    "data",
    tracked("dataloader_num_workers", int, 0, "processes that load samples", bound=NOT_NEGATIVE),
)
SAMPLES = Family.of(
    "data",
    tracked(
        "bad_samples",
        str,
        "raise",
        "unreadable images and missing captions: refuse, or leave out and list them",
        choices=POLICIES,
    ),
    tracked(
        "bad_samples_limit",
        float,
        0.01,
        "largest share of samples that --bad_samples skip may leave out",
        bound=SHARE,
        needs=(_SKIPPING,),
    ),
)
RUN = Family.of(
    "run",
    tracked(
        "train_batch_size",
        int,
        16,
        "images per device and micro-batch",
        bound=COUNT,
        setting="global_batch",
    ),
    tracked("num_train_epochs", int, 100, "passes over the data", bound=COUNT),
    tracked(
        "max_train_steps",
        int,
        help="optimizer steps in all; overrides --num_train_epochs",
        bound=COUNT,
    ),
    tracked(
        "gradient_accumulation_steps",
        int,
        1,
        "micro-batches per step",
        bound=COUNT,
        setting="global_batch",
    ),
    tracked("gradient_checkpointing", help="save memory, spend time: recompute"),
    tracked("seed", int, help="seed of every random draw", bound=_SEED, setting="seed"),
    Flag("local_rank", int, -1, "set by the launcher; LOCAL_RANK overrides it"),
    settle=settle_local_rank,
)
OPTIMIZER = Family.of(
    "optimizer",
    tracked("learning_rate", float, 1e-4, "learning rate after warm-up", bound=NOT_NEGATIVE),
    tracked("scale_lr", help="multiply it by batch x accumulation x processes"),
    tracked("lr_scheduler", str, "constant", "course of the learning rate", known=LR_SCHEDULERS),
    tracked("lr_warmup_steps", int, 500, "optimizer steps of warm-up", bound=NOT_NEGATIVE),
    tracked("use_8bit_adam", help="keep AdamW's state in 8 bits (bitsandbytes)"),
    tracked("adam_beta1", float, 0.9, "decay of the first moment", bound=DECAY),
    tracked("adam_beta2", float, 0.999, "decay of the second moment", bound=DECAY),
    tracked("adam_weight_decay", float, 1e-2, "decoupled weight decay", bound=NOT_NEGATIVE),
    tracked("adam_epsilon", float, 1e-8, "added to the denominator", bound=NOT_NEGATIVE),
    tracked("max_grad_norm", float, 1.0, "longer gradients are cut to this norm", bound=_CLIPPING),
    setting="optimizer",
    check_machine=environment.check_8bit,
)
EMA = Family.of(
    "moving average",
    tracked("use_ema", help="average the weights, and use the average"),
    tracked("offload_ema", help="keep the average in host memory", needs=(_AVERAGED,)),
    tracked("foreach_ema", help="update the average with fused operations", needs=(_AVERAGED,)),
    tracked(
        "ema_decay",
        float,
        0.9999,
        "decay of the average",
        bound=SHARE,
        needs=(_AVERAGED,),
        setting="ema",
    ),
    tracked(
        "ema_interval",
        int,
        1,
        "optimizer steps between its updates",
        bound=COUNT,
        needs=(_AVERAGED,),
        setting="ema",
    ),
)
PRECISION = Family.of(
    "precision",
    tracked(
        "mixed_precision",
        str,
        help="number format of the forward pass (default: what accelerate is configured for)",
        choices=MIXED_PRECISIONS,
    ),
    tracked("allow_tf32", help="multiply float32 matrices in TF32"),
)
KERNELS = Family.of(
    "precision",
    tracked(
        "enable_xformers_memory_efficient_attention",
        help="attention by xformers (needs a CUDA device)",
    ),
    check_machine=environment.check_xformers,
)
OUTPUT = Family.of(
    "output",
    tracked("output_dir", str, "trained-model", "folder of all results", convert=path),
    tracked("logging_dir", str, "logs", "folder of tracker files, in --output_dir", convert=path),
    tracked("report_to", str, "tensorboard", "tracker, or all"),
    tracked("tracker_project_name", str, "training", "project name at the tracker"),
    check_machine=environment.check_output,
)
HUB = Family.of(
    "output",
    tracked("push_to_hub", help="upload the pipeline at the end"),
    Flag("hub_token", str, help="token for the upload; never stored. Prefer `hf auth login`"),
    tracked("hub_model_id", str, help="repository to upload to (default: name of --output_dir)"),
    tracked("license", str, help="licence on the model card (default: that of the base model)"),
    check=environment.check_token,
    check_machine=environment.check_hub,
)
CHECKPOINTS = Family.of(
    "checkpoints",
    tracked("checkpointing_steps", int, 500, "steps between checkpoints", bound=COUNT),
    tracked(
        "checkpoints_total_limit",
        int,
        help="checkpoints kept; older ones are deleted",
        bound=COUNT,
    ),
    tracked(
        "resume_from_checkpoint",
        str,
        help="go on from here: latest, checkpoint-N in --output_dir, or any path",
        convert=path,
    ),
    tracked(
        "allow_config_change",
        str,
        (),
        f"settings that may differ from the run to resume: {', '.join(SETTINGS)}",
        nargs="+",
        choices=tuple(SETTINGS),
        metavar="NAME",
        needs=(_RESUMED,),
    ),
    check_machine=environment.check_resume,
)
LOOP = Family.of(
    "the run, further",
    tracked("log_every", int, 10, "optimizer steps between metrics", bound=COUNT),
    tracked("validation_steps", int, help="optimizer steps between validations", bound=COUNT),
    tracked(
        "nonfinite",
        str,
        "raise",
        "a loss or gradient that is not finite: stop, or leave that update out",
        choices=POLICIES,
    ),
    tracked(
        "max_hours",
        float,
        help="save and stop before so many hours have passed",
        bound=_ABOVE_ZERO,
    ),
)
# What any job takes; the others are for images, kernels and the Hub.
FAMILIES = (LOADING, RUN, OPTIMIZER, EMA, PRECISION, OUTPUT, CHECKPOINTS, LOOP)
