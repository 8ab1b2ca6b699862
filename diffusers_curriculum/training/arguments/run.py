"""Flags that every kind of training shares, named as in diffusers' scripts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.configuration import CONFIG
from diffusers_curriculum.training.arguments.flag import (
    ABOVE_ZERO,
    BATCH,
    FROM_ZERO,
    SEED,
    SETTINGS,
    SHARE,
    SIDE,
    Family,
    Flag,
    Need,
    at_least,
    choice,
    count,
    place,
    sharing,
    tracked,
)
from diffusers_curriculum.training.arguments.imports import IMPORT
from diffusers_curriculum.training.arguments.optimizer import OPTIMIZER
from diffusers_curriculum.training.arguments.output import HUB, OUTPUT
from diffusers_curriculum.training.arguments.streaming import (
    SHUFFLE_BUFFER,
    STREAMING,
    settle_looks,
)
from diffusers_curriculum.training.arguments.validation import HELD_OUT, VALIDATION_LOSS
from diffusers_curriculum.training.errors import UsageError

INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact")
POLICIES = ("raise", "skip")  # for what is not finite
# for samples that cannot be used: all images are looked at, or a sample of them, or none
SAMPLE_POLICIES = (*POLICIES, "sample", "off")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
FILE_DTYPES = ("float32", "float16")
COMPILED = ("none", "blocks", "full")
COMPILE_MODES = ("default", environment.CUDA_GRAPHS, "max-autotune-no-cudagraphs")
ATTENTIONS = ("sdpa", "xformers", "flash", "cudnn", "efficient", "math", "flex")

_OF_A_DATA_SET = Need("--dataset_name", lambda a: a.dataset_name is not None)
_AVERAGED = Need("--use_ema", lambda a: a.use_ema)
_SKIPPING = Need("--bad_samples skip", lambda a: a.bad_samples == "skip")
_CACHED = Need("--cache_latents", lambda a: a.cache_latents)
_RESUMED = Need("--resume_from_checkpoint", lambda a: bool(a.resume_from_checkpoint))


def _check_graphs(args: Any) -> None:
    """Refuse to sum gradients that lie in the memory of CUDA graphs, which the next micro-batch
    writes over (https://github.com/pytorch/pytorch/issues/169545)."""
    steps = args.gradient_accumulation_steps
    if args.compile_mode == environment.CUDA_GRAPHS and steps > 1:
        raise UsageError(
            f"--compile_mode {args.compile_mode} with --gradient_accumulation_steps {steps}: CUDA "
            "graphs write over the gradients that are summed; drop one of the two."
        )


def _check_background(args: Any) -> None:
    if args.background is None:
        return
    from PIL import ImageColor  # here, as few ask for it

    try:
        ImageColor.getrgb(args.background)
    except ValueError as error:
        raise UsageError(
            f"--background is {args.background!r}: name a colour, such as white or '#808080'."
        ) from error


SOURCE = Family.of(
    "data",
    *sharing(
        place("dataset_name", help="data set on the Hub, or one that datasets can load"),
        tracked(
            "dataset_config_name",
            str,
            help="configuration of that data set",
            needs=(_OF_A_DATA_SET,),
        ),
        place("train_data_dir", help="folder of images, in the imagefolder format of datasets"),
        tracked(
            "train_split",
            str,
            help="split of the data to train on (default: train; all of a --train_data_dir)",
        ),
        tracked("image_column", str, "image", "column with the images"),
        count("max_train_samples", help="train on that many samples only, chosen by the seed"),
        STREAMING,
        setting="dataset",
    ),
    place("cache_dir", help="folder for downloaded models and data sets"),
)
IMAGES = Family.of(
    "data",
    count("resolution", 512, "side of the training images", most=SIDE),
    tracked("center_crop", help="crop the middle instead of a random place"),
    tracked("random_flip", help="mirror each image with probability 1/2"),
    choice("image_interpolation_mode", INTERPOLATIONS, "lanczos", "filter used to resize images"),
    tracked(
        "background",
        str,
        help="colour behind transparent pixels, such as white or '#808080' (default: alpha is "
        "dropped, and the colours show that are stored there)",
        metavar="COLOUR",
    ),
    setting="images",
    check=_check_background,
)
LATENT_CACHE = Family.of(
    "latents",
    tracked(
        "cache_latents",
        help="encode every image once and keep mean and std of its latents on disk",
        setting="images",
    ),
    *sharing(
        place("latent_cache_dir", help="folder for them (default: latents in --output_dir)"),
        choice("latent_cache_dtype", FILE_DTYPES, "float32", "number format of the files"),
        count("latent_crops", 1, "random crops kept of each image", setting="images", most=10_000),
        needs=_CACHED,
    ),
)
# changes of scripts that were without the cache, whose checkpoints do not tell of it
YOUNGER_CACHE = {name: {"later": True} for name in ("cache_latents", "latent_crops")}
LOADING = Family.of(
    "data",
    tracked(
        "dataloader_num_workers",
        int,
        0,
        "processes that load samples",
        bound=FROM_ZERO,
        most=1024,  # each takes some 100 MB
    ),
)
SAMPLES = Family.of(
    "data",
    choice(
        "bad_samples",
        SAMPLE_POLICIES,
        "raise",
        "unreadable images and missing captions: refuse, or leave out and list them (skip); sample "
        "and off look at the captions, and at 1,000 images or none, before they refuse (off unless "
        "given with --streaming)",
    ),
    tracked(
        "bad_samples_limit",
        float,
        0.01,
        "largest share of samples that --bad_samples skip may leave out",
        bound=SHARE,
        needs=(_SKIPPING,),
    ),
    SHUFFLE_BUFFER,
    settle=settle_looks,
)
RUN = Family.of(
    "run",
    count(
        "train_batch_size",
        16,
        "images per device and micro-batch",
        setting="global_batch",
        most=BATCH,
    ),
    count("num_train_epochs", 100, "passes over the data"),
    count("max_train_steps", help="optimizer steps in all; overrides the number of epochs"),
    count(
        "gradient_accumulation_steps",
        1,
        "micro-batches per step",
        setting="global_batch",
        most=BATCH,
    ),
    tracked("gradient_checkpointing", help="save memory, spend time: recompute"),
    tracked("seed", int, help="seed of every random draw", bound=SEED, setting="seed"),
    Flag("local_rank", int, -1, "set by the launcher; LOCAL_RANK overrides it", bound=at_least(-1)),
    settle=environment.settle_local_rank,
)
EMA = Family.of(
    "moving average",
    tracked("use_ema", help="average the weights, and use the average"),
    *sharing(
        tracked("offload_ema", help="keep the average in host memory"),
        tracked("foreach_ema", help="update the average with fused operations"),
        tracked("ema_decay", float, 0.9999, "decay of the average", bound=SHARE, setting="ema"),
        count("ema_interval", 1, "optimizer steps between its updates", setting="ema"),
        needs=_AVERAGED,
    ),
)
PRECISION = Family.of(
    "precision",
    choice(
        "mixed_precision",
        MIXED_PRECISIONS,
        help="number format of the forward pass (default: what accelerate is configured for)",
    ),
    tracked("allow_tf32", help="multiply float32 matrices in TF32"),
    choice(
        "compile",
        COMPILED,
        "none",
        "run updates through graphs of torch.compile: of the network (full), or of each of its "
        "repeated blocks, which takes less time to begin with",
        setting="compile",
        later=True,
    ),
    choice(
        "compile_mode",
        COMPILE_MODES,
        help="mode of torch.compile: reduce-overhead replays CUDA graphs, the last searches longer "
        "for fast kernels (default: default)",
        needs=(Need("--compile blocks or full", lambda a: a.compile != "none"),),
        setting="compile",
        later=True,
    ),
    check=_check_graphs,
    check_machine=environment.check_compiler,
)
KERNELS = Family.of(
    "precision",
    tracked(
        "enable_xformers_memory_efficient_attention",
        help="attention by xformers (needs a CUDA device)",
    ),
    choice(
        "attention",
        ATTENTIONS,
        help="what the network's attention is computed by: PyTorch's own (sdpa) or xformers; in "
        "transformers of flow matching also the flash-attn package, one of PyTorch's kernels or "
        "flex attention (default: sdpa)",
    ),
    check=environment.check_attention,
    check_machine=environment.check_kernels,
)
CHECKPOINTS = Family.of(
    "checkpoints",
    count("checkpointing_steps", 500, "steps between checkpoints"),
    count("checkpoints_total_limit", help="checkpoints kept; older ones are deleted"),
    place(
        "resume_from_checkpoint",
        help="go on from here: latest, checkpoint-N in --output_dir, any path, or hub:OWNER/NAME",
    ),
    choice(
        "allow_config_change",
        tuple(SETTINGS),
        (),
        f"settings that may differ from the run to resume: {', '.join(SETTINGS)}",
        nargs="+",
        metavar="NAME",
        needs=(_RESUMED,),
    ),
    check_machine=environment.check_resume,
)
LOOP = Family.of(
    "the run, further",
    CONFIG,
    IMPORT,
    count("log_every", 10, "optimizer steps between metrics"),
    count("validation_steps", help="optimizer steps between validations"),
    choice(
        "nonfinite",
        POLICIES,
        "raise",
        "a loss or gradient that is not finite: stop, or leave that update out",
    ),
    count("profile_steps", help="trace so many steps, after 10, into the folder profile"),
    tracked(
        "max_hours", float, help="save and stop before so many hours have passed", bound=ABOVE_ZERO
    ),
)
# What any job takes; the others are for images, kernels and the Hub.
FAMILIES = (LOADING, RUN, OPTIMIZER, EMA, PRECISION, OUTPUT, CHECKPOINTS, LOOP)
# Families in a row, in the order of diffusers' scripts, and what those scripts lack of them
OF_IMAGES = (IMAGES, LOADING, SAMPLES, HELD_OUT, VALIDATION_LOSS)
OF_MACHINE = (PRECISION, KERNELS, OUTPUT, HUB)
_OURS = {flag.name for family in (SAMPLES, HELD_OUT, VALIDATION_LOSS) for flag in family.flags}
_OURS |= {"attention", "train_split", "background", "ema_decay", "ema_interval", "license"}
_OURS |= {"allow_config_change", "overwrite_output_dir", "lr_num_cycles", "lr_power", "lr_end"}
_OURS |= {"validation_clip_score", "data_config", "compile", "compile_mode", "streaming"}
_OURS |= {"hub_strategy", "hub_private_repo"}
_OURS |= {f.name for f in OPTIMIZER.flags if f.name.startswith(("optimizer", "prodigy_"))}


def official(families: Sequence[Family], *, without: Collection[str] = ()) -> str:
    """Names of the flags that diffusers' scripts have, of families that are named as there, but for
    those that one script lacks."""
    ours = {*_OURS, *without}
    return " ".join(f.name for family in families for f in family.flags if f.name not in ours)
