"""When a GPU's memory runs out in a step or a validation: finds out whose, and switches off what takes memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from job.common.out_of_memory import out_of_memory
from job.errors import JobError
from job.log import get_logger
from job.model.fused.frozen_weights import forget_dequantized
from job.model.gradient_checkpointing import recompute_activations
from job.model.placed_weights import OtherOutOfMemory, taking_part
from job.records import ExecutionPlan
from job.training.config import StepAbandoned


def unless_memory_runs_out(
    model: Any, compute: Callable[[], torch.Tensor], check: Callable[[RuntimeError], None]
) -> tuple[torch.Tensor | None, bool]:
    """Calls `compute`, which uses the model; called in all processes.

    Args:
        model: The PEFT model; processes that share its weights wait here for each other (`taking_part`).
        compute: The work of this process.
        check: Called with the error if memory ran out in this process; raises if the work cannot take less memory.

    Returns:
        What `compute` returned, or None if memory ran out; and whether it ran out in this process, and not only in one
        with which this one computes a row together.

    Raises:
        StepAbandoned: Another process has ended.
        RuntimeError: `compute` failed for another reason than memory.
    """
    computed, full = None, False
    try:
        with taking_part(model):
            computed = compute()
    except JobError as error:  # another process has ended while weights were gathered
        raise StepAbandoned from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        full = not isinstance(error, OtherOutOfMemory)
        if full:
            check(error)
    return computed, full


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
    message = "out of GPU memory: an optimization that only saves time is switched off"
    get_logger().warning(message, what=name, change="a smaller JOB_TRAIN__MICRO_BATCH_TOKENS leaves memory for it")
    return plan
