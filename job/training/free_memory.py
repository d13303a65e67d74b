"""After a GPU's memory has run out: switches off optimizations that take memory."""

from __future__ import annotations

from typing import Any

from job.log import get_logger
from job.model.fused.frozen_weights import forget_dequantized
from job.model.gradient_checkpointing import recompute_activations
from job.records import ExecutionPlan


def drop_optimization(model: Any, plan: ExecutionPlan) -> ExecutionPlan:
    """Switches off the first optimization of `plan.droppable`, which takes memory and saves time; changes no bit.

    Args:
        model: The model that follows the plan; changed in place.
        plan: A plan with at least one droppable optimization. Its CUDA graphs must already be released, since they
            write to memory that is freed here.

    Returns:
        The plan without this optimization.
    """
    name = plan.droppable[0]
    plan = plan.give_up(name)
    if name == "kept_base":
        forget_dequantized(model)
    elif name == "kept_activations":
        recompute_activations(model, on=True, random=not plan.padded)
    what = "out of GPU memory: an optimization that only saves time is switched off"
    get_logger().warning(what, what=name, change="a smaller JOB_TRAIN__MICRO_BATCH_TOKENS leaves memory for it")
    return plan
