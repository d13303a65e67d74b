"""A recipe and an execution plan, which tests adapt with `dataclasses.replace`."""

from __future__ import annotations

from job.records import PEFT, ExecutionPlan
from job.training.config import Recipe

RECIPE = Recipe(
    seed=3,
    total_steps=1,
    learning_rate=1e-3,
    scheduler="linear",
    warmup_steps=0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    global_batch_size=8,
    micro_batch_tokens=10_000,
    optimizer="adamw_torch",
    save_every_steps=10,
)
PLAN = ExecutionPlan(kept_base=False, kept_activations=True, recorded=False, reason="a test", forward=PEFT)
