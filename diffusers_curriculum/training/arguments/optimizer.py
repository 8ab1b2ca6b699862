"""Flags of the optimizer and its learning rate, named as in diffusers' scripts."""

from __future__ import annotations

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.flag import (
    DECAY,
    FROM_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    Bound,
    Family,
    Need,
    count,
    sharing,
    tracked,
    truth,
)

# diffusers' names. `piecewise_constant` needs rules that no flag can give.
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
OPTIMIZERS = ("AdamW", "prodigy")  # diffusers' words

_RESTARTS = Need(
    "--lr_scheduler cosine_with_restarts", lambda a: a.lr_scheduler == "cosine_with_restarts"
)
_POLYNOMIAL = Need("--lr_scheduler polynomial", lambda a: a.lr_scheduler == "polynomial")
_ADAMW = Need("--optimizer AdamW", lambda a: a.optimizer == "AdamW")
_PRODIGY = Need("--optimizer prodigy", lambda a: a.optimizer == "prodigy")
_CLIPPING = Bound("above 0 (inf: no clipping)", lambda x: x > 0)


def _in_its_case(flag: str, value: str) -> str:
    """A word as it is written here, whatever its case, as in diffusers' scripts."""
    return next((name for name in OPTIMIZERS if name.lower() == value.lower()), value)


OPTIMIZER = Family.of(
    "optimizer",
    tracked("learning_rate", float, 1e-4, "learning rate after warm-up", bound=NOT_NEGATIVE),
    tracked("scale_lr", help="multiply it by batch x accumulation x processes"),
    tracked("lr_scheduler", str, "constant", "course of the learning rate", known=LR_SCHEDULERS),
    tracked("lr_warmup_steps", int, 500, "optimizer steps of warm-up", bound=FROM_ZERO),
    count("lr_num_cycles", help="restarts (default: 1)", needs=(_RESTARTS,), later=True),
    *sharing(
        tracked(
            "lr_power", float, help="exponent of the decay (default: 1)", bound=POSITIVE, later=True
        ),
        tracked(
            "lr_end", float, help="rate at its end (default: 1e-7)", bound=NOT_NEGATIVE, later=True
        ),
        needs=_POLYNOMIAL,
    ),
    tracked(
        "optimizer",
        str,
        "AdamW",
        "AdamW, or prodigy, which finds the scale of the learning rate by itself: give "
        "--learning_rate 1 (arXiv 2306.06101; needs prodigyopt)",
        known=OPTIMIZERS,
        convert=_in_its_case,
        later=True,
    ),
    tracked("use_8bit_adam", help="keep AdamW's state in 8 bits (bitsandbytes)", needs=(_ADAMW,)),
    tracked("adam_beta1", float, 0.9, "decay of the first moment", bound=DECAY),
    tracked("adam_beta2", float, 0.999, "decay of the second moment", bound=DECAY),
    tracked("adam_weight_decay", float, 1e-2, "decoupled weight decay", bound=NOT_NEGATIVE),
    tracked("adam_epsilon", float, 1e-8, "added to the denominator", bound=NOT_NEGATIVE),
    *sharing(
        tracked(
            "prodigy_beta3",
            float,
            help="decay of what Prodigy finds the scale by (default: the root of --adam_beta2)",
            bound=DECAY,
            later=True,
        ),
        tracked("prodigy_decouple", truth, True, "decay weights as AdamW does", later=True),
        tracked(
            "prodigy_use_bias_correction", truth, True, "correct the bias as Adam does", later=True
        ),
        tracked(
            "prodigy_safeguard_warmup",
            truth,
            True,
            "leave the learning rate out of the denominator of the scale",
            later=True,
        ),
        needs=_PRODIGY,
    ),
    tracked("max_grad_norm", float, 1.0, "longer gradients are cut to this norm", bound=_CLIPPING),
    setting="optimizer",
    check_machine=environment.check_optimizer,
)
