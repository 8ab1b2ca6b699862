"""Flags of training on the codes of images."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from diffusers_curriculum.metrics.choices import METRICS, OF_FEATURES
from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.classes import (
    GUIDANCE,
    GUIDED,
    LABEL_COLUMN,
    LABEL_DROPOUT,
    OF_ANY_CLASS,
    OF_CLASSES,
    PICTURE_EPOCHS,
)
from diffusers_curriculum.training.arguments.command_line import CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
from diffusers_curriculum.training.arguments.evaluation import EVALUATION
from diffusers_curriculum.training.arguments.flag import (
    COUNT,
    POSITIVE,
    Bound,
    Family,
    Need,
    pairs,
    sharing,
    tracked,
)
from diffusers_curriculum.training.arguments.images import AUTOENCODER, PICTURES, network
from diffusers_curriculum.training.arguments.output import HUB, OUTPUT
from diffusers_curriculum.training.arguments.run import (
    CHECKPOINTS,
    EMA,
    LATENT_CACHE,
    LOOP,
    OF_IMAGES,
    OPTIMIZER,
    PRECISION,
    RUN,
    SOURCE,
    official,
)
from diffusers_curriculum.training.arguments.validation import KEPT_APART
from diffusers_curriculum.training.errors import UsageError

_CONDITIONAL = Need("--class_conditional", lambda a: a.class_conditional)
_UNCONDITIONAL = Need(
    "unconditional training (drop --class_conditional)", lambda a: not a.class_conditional
)
_LABELLED = Need(
    "--class_conditional or --eval_metrics linear_probe",
    lambda a: a.class_conditional or has_probe(a),
)
_FRESH = Need(
    "a fresh network (drop --pretrained_model_name_or_path, which brings its own)",
    lambda a: a.pretrained_model_name_or_path is None,
)
_OF_DENOISERS = ("auto", "information_rate", "gradient_norm")


def has_probe(args: Any) -> bool:
    """Whether a linear classifier is fitted to features."""
    return "linear_probe" in (args.eval_metrics or ())


def _check(args: Any) -> None:
    if args.timestep_sampler in _OF_DENOISERS:
        raise UsageError(
            f"--timestep_sampler is {args.timestep_sampler}, which is derived for the errors of a "
            "denoiser, and codes have none: give another one, such as loss_proportional."
        )
    if args.data_scale != 1:
        raise UsageError(f"--data_scale is {args.data_scale}, and codes have no scale: drop it.")
    if args.cache_latents and args.latent_cache_dtype == "float16":
        raise UsageError(
            "--latent_cache_dtype is float16, which rounds the numbers of codes: drop it."
        )
    if has_probe(args) and not KEPT_APART.holds(args):
        raise UsageError(
            f"--eval_metrics is {' '.join(args.eval_metrics)}: a linear probe is judged on samples "
            "that are kept apart: give --validation_split or --validation_data_dir."
        )


def _check_machine(args: Any) -> None:
    if has_probe(args) and find_spec("sklearn") is None:
        raise UsageError(
            f"--eval_metrics {' '.join(args.eval_metrics)} needs scikit-learn, which cannot be "
            "found: pip install scikit-learn."
        )


_MODEL = network(
    tracked(
        "model_type",
        str,
        help="causal language model of transformers to train from scratch, such as gpt2 or llama "
        "(default: gpt2)",
        dest="model_config",
        needs=(_FRESH,),
    ),
    "image token",
)
_SETTINGS = Family.of(
    "model",
    pairs(
        "model_args",
        "settings of its config, for example n_layer=8 n_embd=512 n_head=8",
        needs=(_FRESH,),
    ),
    setting="model",
)
_LABELS = Family.of(
    "data",
    tracked("class_conditional", help="learn images given their class", setting="model"),
    *sharing(LABEL_COLUMN, needs=_LABELLED),
    *sharing(LABEL_DROPOUT, needs=_CONDITIONAL),
    check_machine=lambda args: environment.check_data(args, "a folder of images"),
)
_PICTURES = Family.of(
    "pictures",
    tracked("no_pictures", help="draw none, neither on the way nor at the end"),
    *sharing(
        *sharing(*OF_CLASSES, needs=_CONDITIONAL),
        *sharing(OF_ANY_CLASS, needs=_UNCONDITIONAL),
        PICTURE_EPOCHS,
        needs=PICTURES,
    ),
    *sharing(GUIDANCE, needs=_CONDITIONAL),
    *sharing(
        tracked("temperature", float, 1.0, "what logits are divided by to draw", bound=POSITIVE),
        tracked("top_k", int, help="draw among so many of the likeliest codes", bound=COUNT),
        tracked(
            "top_p",
            float,
            help="draw among the likeliest codes that have this probability together",
            bound=Bound("above 0 and at most 1", lambda x: 0 < x <= 1),
        ),
        needs=GUIDED,
    ),
)
_MEASURED = EVALUATION.changed(
    {
        "eval_num_inference_steps": None,
        "eval_metrics": {
            "choices": (*METRICS, *OF_FEATURES),
            "help": "fid (arXiv 1706.08500), kid (1801.01401), fd_dinov2 (2306.04675), "
            "precision_recall (1904.06991); linear_probe: how well a linear classifier tells "
            "classes from the features of the middle layer (2110.04627)",
        },
    }
)
_TOGETHER = Family.of("metrics while training", check=_check, check_machine=_check_machine)
_INPUT = (_MODEL, _SETTINGS, SOURCE, _LABELS, *OF_IMAGES, AUTOENCODER, LATENT_CACHE)
_FAMILIAR = (*_INPUT, RUN, OPTIMIZER, EMA, PRECISION, OUTPUT, HUB, CHECKPOINTS)
COMMAND_LINE = CommandLine(
    "Train a causal language model on the codes of images (arXiv 2110.04627).",
    (*_FAMILIAR, *NOISE_LEVELS, _PICTURES, _MEASURED, _TOGETHER, LOOP),
    official=official(_FAMILIAR),
    changes={
        "output_dir": {"default": "image-tokens"},
        "tracker_project_name": {"default": "image-tokens"},
        "resolution": {"default": 256},
        "guidance_scale": {"default": 1.0},
        "cache_latents": {
            "help": "encode every image once and keep the numbers of its codes on disk"
        },
        "pretrained_vae_model_name_or_path": {
            "help": "autoencoder (ViTVQModel or VQModel) whose codes are learned: a folder or a "
            "repository on the Hub (default: the pipeline's own)"
        },
        "validation_loss_quantiles": {
            "help": "parts of the positions in raster order that it is also told of"
        },
        "timestep_sampler": {
            "help": "law over positions: the noise levels of position i of N are those of flow "
            "matching with i / N of the data known, so that the first codes count as noise "
            "(docs/catalogue.md); its mass is what their losses weigh"
        },
        "validation_steps": {"needs": (PICTURES,)},
    },
)
