"""Training an unconditional model: diffusers' train_unconditional.py, and more."""

from __future__ import annotations

from typing import Any

from diffusers_curriculum.training.arguments import environment
from diffusers_curriculum.training.arguments.classes import OF_ANY_CLASS
from diffusers_curriculum.training.arguments.command_line import Arguments, CommandLine
from diffusers_curriculum.training.arguments.curriculum import NOISE_LEVELS
from diffusers_curriculum.training.arguments.evaluation import EVALUATION
from diffusers_curriculum.training.arguments.flag import (
    LEVELS,
    POSITIVE,
    Family,
    Need,
    count,
    place,
    sharing,
    tracked,
)
from diffusers_curriculum.training.arguments.images import (
    AUTOENCODED,
    AUTOENCODER,
    DDPM,
    FORMULATION,
    PICTURES,
    POWER_EMA,
    PROCESS,
    network,
    pictures,
)
from diffusers_curriculum.training.arguments.noise_levels import PREDICTION, SLOWED
from diffusers_curriculum.training.arguments.run import (
    CHECKPOINTS,
    EMA,
    LATENT_CACHE,
    LOOP,
    OF_IMAGES,
    OF_MACHINE,
    OPTIMIZER,
    RUN,
    SOURCE,
)
from diffusers_curriculum.training.loop.task import JobParts
from diffusers_curriculum.training.tasks.images import ImageTask

_WANTED = "a folder of images"
_AVERAGED = Need("--use_ema", lambda a: a.use_ema)
_FROM_IMAGES = Need("images to train on (drop --cache_latents)", lambda a: not a.cache_latents)

_MODEL = network(
    place(
        "model_config_name_or_path",
        help="network to train: a config (file, folder, Hub repository), or DiT-S/2 ... DiT-XL/8 "
        "(default: the U-Net of DDPM)",
        dest="model_config",
    ),
    "unconditional",
)
_DATA = Family.of(
    "data",
    tracked(
        "preserve_input_precision",
        help="keep 16-bit images at their precision instead of 8 bits",
        needs=(_FROM_IMAGES,),
        setting="images",
    ),
    check_machine=lambda args: environment.check_data(args, _WANTED),
)
_WARM_UP = Family.of(
    "moving average",
    tracked("ema_inv_gamma", float, 1.0, "inverse gamma of the average's warm-up", bound=POSITIVE),
    tracked("ema_power", float, 3 / 4, "power of the average's warm-up", bound=POSITIVE),
    needs=_AVERAGED,
    setting="ema",
)
_PICTURES = pictures(
    *sharing(
        OF_ANY_CLASS,
        count(
            "ddpm_num_inference_steps",
            1000,
            "denoising steps per picture",
            dest="validation_inference_steps",
            most=LEVELS,
        ),
        count("save_images_epochs", 10, "epochs between pictures", dest="validation_epochs"),
        needs=PICTURES,
    ),
    count("save_model_epochs", 10, "epochs between copies of the pipeline"),
    sampler="DDPMScheduler",
)
_INPUT = (_MODEL, SOURCE, _DATA, *OF_IMAGES, AUTOENCODER, LATENT_CACHE)
_TRAINING = (RUN, OPTIMIZER, EMA, _WARM_UP, PREDICTION, PROCESS, FORMULATION)
_RESULTS = (*OF_MACHINE, CHECKPOINTS)
_LEVELS = (*NOISE_LEVELS, SLOWED)
OFFICIAL = (
    "model_config_name_or_path dataset_name dataset_config_name train_data_dir cache_dir "
    "resolution center_crop random_flip dataloader_num_workers preserve_input_precision "
    "train_batch_size eval_batch_size num_epochs save_images_epochs save_model_epochs "
    "gradient_accumulation_steps local_rank mixed_precision "
    "enable_xformers_memory_efficient_attention learning_rate lr_scheduler lr_warmup_steps "
    "adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema ema_inv_gamma ema_power "
    "ema_max_decay prediction_type ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule "
    "output_dir overwrite_output_dir logger logging_dir push_to_hub hub_token hub_model_id "
    "hub_private_repo checkpointing_steps checkpoints_total_limit resume_from_checkpoint"
)


class Unconditional(ImageTask):
    """Images alone."""

    command_line = CommandLine(
        "Train an unconditional diffusion or flow model with a curriculum over noise levels and "
        "importance sampling.",
        (*_INPUT, *_TRAINING, *_RESULTS, *_LEVELS, POWER_EMA, _PICTURES, EVALUATION, LOOP),
        official=OFFICIAL,
        changes={
            # the official names and defaults
            "num_train_epochs": {"name": "num_epochs"},
            "report_to": {"name": "logger", "choices": ("tensorboard", "wandb"), "help": "tracker"},
            "ema_decay": {"name": "ema_max_decay", "help": "decay of the average after warm-up"},
            "output_dir": {"default": "ddpm-model-64"},
            "tracker_project_name": {"default": "unconditional"},
            "resolution": {"default": 64},
            "image_interpolation_mode": {"default": "bilinear"},
            "lr_scheduler": {"default": "cosine"},
            "adam_beta1": {"default": 0.95},
            "adam_weight_decay": {"default": 1e-6},
            "mixed_precision": {"default": "no", "help": "number format of the forward pass"},
            "prediction_type": {
                "default": "epsilon",
                "choices": ("epsilon", "sample", "v_prediction"),
                "help": "what the network predicts",
                "needs": (DDPM,),
            },
            "cache_latents": {"needs": (AUTOENCODED,)},
            "validation_steps": {"needs": (PICTURES,)},
        },
    )
    default_vp = "DDPMScheduler"
    average_warmup = ("inv_gamma", "power")

    def settle(self, args: Arguments) -> None:
        super().settle(args)
        # The official default is meant for a new DDPM; a pipeline, a flow and EDM have their own.
        own = args.formulation != "ddpm" or args.pretrained_model_name_or_path is not None
        if own and "prediction_type" not in args.given:
            args.prediction_type = None
        # The official script weighs the loss of x0 by the SNR, which makes it that of the noise.
        weighed = {"snr_gamma", "loss_weighting", "loss_weighting_args"} & args.given
        if args.prediction_type == "sample" and not weighed:
            args.loss_weighting = "unit_epsilon"
        # 1,000 steps are meant for DDPM; a flow and EDM need few. Metrics of DDPM need as many as
        # its pictures, which another sampler would not.
        several = args.formulation in ("flow", "edm")
        if several and "validation_inference_steps" not in args.given:
            args.validation_inference_steps = 50
        ancestral = args.formulation == "ddpm" and args.sampling_scheduler is None
        if ancestral and "eval_num_inference_steps" not in args.given:
            args.eval_num_inference_steps = args.validation_inference_steps

    def dataset_options(self, args: Arguments) -> dict[str, Any]:
        return {"precise": args.preserve_input_precision}

    def after_update(self, job: JobParts, done: int, *outcome: Any) -> None:
        ends = job.plan.epoch_is_due(done, job.args.save_model_epochs)
        if ends and done < job.args.max_train_steps:
            self.published.keep()
        super().after_update(job, done, *outcome)
