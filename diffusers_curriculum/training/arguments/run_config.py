"""What a tracker may know about a run: an allow-list, so that a secret cannot slip in."""

from __future__ import annotations

import argparse
import re
from typing import Any

# Each name is listed on purpose. accelerate's TensorBoard tracker writes what it gets to disk, next
# to the files that are uploaded, so a token among "all arguments" would become public.
_NAMES = (
    # model and data
    "pretrained_model_name_or_path revision variant non_ema_revision dataset_name "
    "dataset_config_name train_data_dir image_column caption_column max_train_samples "
    "resolution center_crop random_flip image_interpolation_mode dataloader_num_workers "
    # run and optimizer
    "train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps "
    "gradient_checkpointing seed learning_rate scale_lr lr_scheduler lr_warmup_steps "
    "use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm "
    # objective
    "prediction_type snr_gamma noise_offset input_perturbation dream_training "
    "dream_detail_preservation loss_weighting loss_weighting_args caption_dropout "
    # timesteps and curriculum
    "timestep_sampler timestep_sampler_args timestep_draw timestep_floor importance_correction "
    "timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin timestep_bias_end "
    "timestep_bias_portion "
    "curriculum curriculum_order curriculum_clusters curriculum_clustering "
    "curriculum_boundaries curriculum_min_size curriculum_within curriculum_pacing "
    "curriculum_patience curriculum_min_delta curriculum_smoothing curriculum_min_stage_steps "
    "curriculum_max_stage_steps curriculum_stage_steps curriculum_total_steps "
    "curriculum_max_share "
    # averaging, validation, precision
    "use_ema offload_ema foreach_ema ema_decay ema_interval validation_prompts validation_epochs "
    "validation_steps mixed_precision allow_tf32 enable_xformers_memory_efficient_attention "
    # output and checkpoints
    "output_dir logging_dir report_to tracker_project_name push_to_hub hub_model_id license "
    "log_every timestep_plot_steps checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint nonfinite max_hours bad_samples bad_samples_limit allow_config_change "
    # class-conditional and unconditional training
    "model_config model_config_name_or_path pretrained_vae_model_name_or_path cache_latents "
    "latent_cache_dir latent_cache_dtype latent_crops label_column label_dropout "
    "learned_variance formulation "
    "ddpm_num_steps ddpm_beta_schedule ddpm_num_inference_steps flow_shift sigma_data sigma_min "
    "sigma_max discrete_timesteps power_ema power_ema_snapshot_steps power_ema_dtype "
    "ema_inv_gamma ema_power ema_max_decay no_pictures validation_classes guidance_scale "
    "validation_images_per_class validation_inference_steps sampling_scheduler num_epochs "
    "save_images_epochs save_model_epochs eval_batch_size overwrite_output_dir hub_private_repo "
    "preserve_input_precision logger eval_steps eval_metrics eval_samples "
    "eval_num_inference_steps eval_generation_batch_size eval_feature_model eval_feature_weights"
)
TRACKED = tuple(_NAMES.split())


def tracker_config(args: argparse.Namespace) -> dict[str, bool | int | float | str]:
    """The arguments that trackers may store, as scalars; unset ones are left out."""
    given = {name: getattr(args, name, None) for name in TRACKED}
    return {name: _scalar(value) for name, value in given.items() if value not in (None, {}, [])}


def _scalar(value: Any) -> bool | int | float | str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, bool | int | float):
        return value
    # an address may carry a password: https://user:password@host
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", str(value))
