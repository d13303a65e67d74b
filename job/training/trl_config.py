"""The options of TRL's trainer: only those that have an effect in this project's training.

To add one: its value in `trl_config`, and its effect in `OPTIONS`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from job.common.optimizers import trainer_name
from job.common.schedulers import SCHEDULERS, Schedule
from job.records import ExecutionPlan
from job.training.config import Recipe

OPTIONS = {
    "output_dir": "where Trainer may write; required",
    "max_steps": "the length of the schedule and of the loop",
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), "1: a step of the loop is a step"),
    **dict.fromkeys(("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"), "the schedule"),
    **dict.fromkeys(("optim", "weight_decay", "max_grad_norm"), "the optimizer and clipping"),
    **dict.fromkeys(("bf16", "fp16"), "autocast, and loss scaling"),
    "loss_type": "what compute_loss computes",
    "router_aux_loss_coef": "what compute_loss adds for a mixture of experts: nothing",
    "use_cpu": "where",
    "seed": "the seed that Trainer sets in its constructor",
    **dict.fromkeys(("logging_steps", "logging_nan_inf_filter"), "log() is called after every step, with its own loss"),
    **dict.fromkeys(("save_strategy", "save_steps"), "when _save_checkpoint() is called"),
    "ignore_data_skip": "the batch plan starts at the step of the checkpoint",
    **dict.fromkeys(("remove_unused_columns", "max_length", "dataset_kwargs"), "TRL leaves the data set alone"),
    **dict.fromkeys(("report_to", "disable_tqdm"), "only the job reports metrics"),
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), "off: switched on the model, by the plan"),
}
"""Option of SFTConfig -> its effect in `training/trainer.py`. TRL would accept other options (of packing, a data
loader, an evaluation) although they have no effect here, so `sft_config` refuses them."""


def sft_config(**options: Any) -> SFTConfig:
    """TRL's configuration.

    Raises:
        ValueError: An option would have no effect here, see `OPTIONS`.
    """
    if unknown := sorted(options.keys() - OPTIONS.keys()):
        raise ValueError(f"options of SFTConfig that would do nothing in this trainer: {', '.join(unknown)}")
    return SFTConfig(**options)


def trl_config(recipe: Recipe, plan: ExecutionPlan, folder: Path, model: Any) -> SFTConfig:
    """The configuration of Trainer for this recipe and model; Trainer may write into `folder`."""
    dtype, scheduler = model.get_base_model().dtype, SCHEDULERS[recipe.scheduler]
    schedule = Schedule(recipe.total_steps, recipe.warmup_steps, recipe.min_lr_ratio, recipe.decay_steps)
    return sft_config(
        output_dir=str(folder),
        max_steps=recipe.total_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=scheduler.transformers_name(schedule),
        lr_scheduler_kwargs=scheduler.options(schedule),
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        # With infinity Trainer still computes the norm, for the metrics, and multiplies the gradient by exactly 1.
        max_grad_norm=recipe.max_grad_norm or math.inf,
        optim=trainer_name(recipe.optimizer),
        # The argument's name differs between the supported versions of TRL.
        **dict.fromkeys(
            {"activation_checkpointing", "gradient_checkpointing"} & SFTConfig.__dataclass_fields__.keys(), False
        ),
        # Fused layers cast the adapter's fp32 weights themselves; PEFT's need autocast for it.
        bf16=dtype is torch.bfloat16 and not plan.fused,
        fp16=dtype is torch.float16,
        loss_type="nll",
        use_cpu=model.device.type != "cuda",
        seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        save_strategy="steps",
        save_steps=recipe.save_every_steps,
        ignore_data_skip=True,
        remove_unused_columns=False,
        router_aux_loss_coef=0.0,  # only the loss of the tokens, whatever a mixture-of-experts' config.json has
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        disable_tqdm=True,
    )
