"""TRL's configuration of a recipe. Trainer sees one batch a step; micro-batches are cut inside the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from job.training.config import Recipe

SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def trl_config(recipe: Recipe, folder: Path, model: Any) -> SFTConfig:
    """How Trainer is to train.

    Args:
        recipe: The same in the job's words.
        folder: Where Trainer may write.
        model: The one that is trained.
    """
    on_gpu = model.device.type == "cuda"
    dtype = model.get_base_model().dtype
    return SFTConfig(
        output_dir=str(folder),
        max_steps=recipe.total_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=SCHEDULERS[recipe.scheduler],
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        # Switched on by hand on the model: the argument's name changed between the versions that we admit.
        **dict.fromkeys(
            {"activation_checkpointing", "gradient_checkpointing"} & SFTConfig.__dataclass_fields__.keys(), False
        ),
        bf16=dtype is torch.bfloat16 and recipe.autocast,
        fp16=dtype is torch.float16,
        use_cpu=not on_gpu,
        seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        save_strategy="steps",
        save_steps=recipe.save_every_steps,
        ignore_data_skip=True,  # the plan seeks, nothing has to be skipped
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        disable_tqdm=True,
    )
