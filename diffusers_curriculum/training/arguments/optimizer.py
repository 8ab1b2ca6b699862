"""Flags of the optimizer and its learning rate, named as in diffusers' scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffusers_curriculum.training.arguments.environment import satisfied
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


@dataclass(frozen=True)
class Optimizer:
    """What --optimizer may name.

    Attributes:
        kind: its class, with the module.
        keywords: of its constructor, and the flag or flags whose value each gets; the learning rate
            is ``lr`` for all.
        package: what pip installs it from; ``extra`` of this project brings it, if any does.
        settings: more keywords.
        group: what its first step would add to its groups, and a checkpoint must find there.
        defaults: of flags, where they are others than those of AdamW.
        above_zero: flags that it takes no 0 for, with a usual value.
        fused: whether there are kernels that can leave an update out without asking the host.
        finds_scale: whether it multiplies the learning rate by a scale of its own.
        beside: for parameters that are no matrices, if it takes matrices only.
    """

    kind: str
    keywords: Mapping[str, str | tuple[str, ...]]
    package: str | None = None
    extra: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    group: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    above_zero: Mapping[str, str] = field(default_factory=dict)
    fused: bool = False
    finds_scale: bool = False
    beside: Optimizer | None = None

    @property
    def flags(self) -> frozenset[str]:
        """Those that it takes, besides the learning rate."""
        own = (f for names in self.keywords.values() for f in _several(names))
        return frozenset(own) | (self.beside.flags if self.beside else frozenset())

    def arguments(self, args: Any) -> dict[str, Any]:
        """Of its constructor, besides parameters and learning rate."""
        given = {
            keyword: args[names] if isinstance(names, str) else tuple(args[name] for name in names)
            for keyword, names in self.keywords.items()
        }
        return given | dict(self.settings)


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


_BETAS = {"betas": ("adam_beta1", "adam_beta2")}
_DECAY = {"weight_decay": "adam_weight_decay"}
_ADAM = {**_BETAS, **_DECAY, "eps": "adam_epsilon"}
_PRODIGY = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
_ADAMW = Optimizer("torch.optim.AdamW", _ADAM, fused=True)
_FIRST_SCALE = 1e-6  # Prodigy's own default
# By the words of diffusers, then by those of other trainers
OPTIMIZERS = {
    "AdamW": _ADAMW,
    "prodigy": Optimizer(
        "prodigyopt.Prodigy",
        _ADAM | {name: f"prodigy_{name}" for name in _PRODIGY},
        package="prodigyopt",
        extra="prodigy",
        settings={"d0": _FIRST_SCALE},
        group={"d_denom": 0.0, "d_hat": _FIRST_SCALE},
        above_zero={"learning_rate": "1", "adam_epsilon": "1e-8"},
        finds_scale=True,
    ),
    "adamw8bit": Optimizer(
        "bitsandbytes.optim.AdamW8bit", _ADAM, package="bitsandbytes>=0.50", extra="quantization"
    ),
    "adafactor": Optimizer(
        "transformers.optimization.Adafactor",
        _DECAY,
        settings={"scale_parameter": False, "relative_step": False},
    ),
    "lion": Optimizer(
        "lion_pytorch.Lion",
        _BETAS | _DECAY,
        package="lion-pytorch",
        extra="lion",
        defaults={"adam_beta2": 0.99},
        above_zero={"learning_rate": "1e-5"},
    ),
    "muon": Optimizer(
        "torch.optim.Muon",
        _DECAY,
        package="torch>=2.9",
        settings={"adjust_lr_fn": "match_rms_adamw"},  # so that rates are those of AdamW
        beside=_ADAMW,
    ),
}
_RESTARTS = Need(
    "--lr_scheduler cosine_with_restarts", lambda a: a.lr_scheduler == "cosine_with_restarts"
)
_POLYNOMIAL = Need("--lr_scheduler polynomial", lambda a: a.lr_scheduler == "polynomial")
_IS_ADAMW = Need("--optimizer AdamW", lambda a: a.optimizer == "AdamW")
_CLIPPING = Bound("above 0 (inf: no clipping)", lambda x: x > 0)


def chosen_optimizer(args: Any) -> Optimizer:
    """The one that a command line asks for."""
    return OPTIMIZERS[_chosen_name(args)]


def _chosen_name(args: Any) -> str:
    return "adamw8bit" if args.use_8bit_adam else args.optimizer


def _in_its_case(flag: str, value: str) -> str:
    """A word as it is written here, whatever its case, as in diffusers' scripts."""
    return next((name for name in OPTIMIZERS if name.lower() == value.lower()), value)


def _taken(flag: str) -> tuple[Need, ...]:
    """That the optimizer takes a flag, which not all do."""
    names = [name for name, each in OPTIMIZERS.items() if flag in each.flags]
    told = Need(f"--optimizer {', '.join(names)}", lambda a: flag in OPTIMIZERS[a.optimizer].flags)
    return (told,) if len(names) < len(OPTIMIZERS) else ()


def _expand(args: Any) -> None:
    """AdamW in 8 bits, by its other name."""
    if args.optimizer == "adamw8bit":
        args.optimizer, args.use_8bit_adam = "AdamW", True


def _settle(args: Any) -> None:
    for name, value in chosen_optimizer(args).defaults.items():
        if name not in args.given:
            setattr(args, name, value)


def _check_machine(args: Any) -> None:
    """Refuse an optimizer without its package."""
    chosen = chosen_optimizer(args)
    if chosen.package is None or satisfied(chosen.package):
        return
    flag = "use_8bit_adam" if "use_8bit_adam" in args.given else f"optimizer {_chosen_name(args)}"
    source = f"diffusers-curriculum[{chosen.extra}]" if chosen.extra else chosen.package
    raise UsageError(f"--{flag} needs {chosen.package}: pip install '{source}', or drop the flag.")


# of the optimizers, some of which do not take them
_NUMBERS = (
    tracked("adam_beta1", float, 0.9, "decay of the first moment", bound=DECAY),
    tracked("adam_beta2", float, 0.999, "decay of the second moment (lion: 0.99)", bound=DECAY),
    tracked("adam_weight_decay", float, 1e-2, "decoupled weight decay", bound=NOT_NEGATIVE),
    tracked("adam_epsilon", float, 1e-8, "added to the denominator", bound=NOT_NEGATIVE),
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
)
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
        f"{', '.join(OPTIMIZERS)}; prodigy finds the scale of the learning rate by itself: give "
        "--learning_rate 1",
        known=tuple(OPTIMIZERS),
        convert=_in_its_case,
        later=True,
    ),
    tracked(
        "use_8bit_adam", help="keep AdamW's state in 8 bits (bitsandbytes)", needs=(_IS_ADAMW,)
    ),
    *(replace(flag, needs=_taken(flag.name)) for flag in _NUMBERS),
    tracked("max_grad_norm", float, 1.0, "longer gradients are cut to this norm", bound=_CLIPPING),
    setting="optimizer",
    expand=_expand,
    settle=_settle,
    check_machine=_check_machine,
)
