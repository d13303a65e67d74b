"""Training on a CPU: whether activations are kept for the backward pass or recomputed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from job.common.formatting import size
from job.common.resources import available_bytes
from job.training.memory_model import Setup, activation_bytes

SHARE = 0.3
"""Share of the available memory that activations on a CPU may take according to the formula. The rest is for what the
formula leaves out: dropout masks (half the size of the activations), gradients, optimizer states, other processes."""


def keeps_activations(setup: Setup, tokens: int, processes: int) -> bool:
    """Whether all activations fit in a CPU's memory, so that none has to be recomputed.

    Args:
        setup: The model, its adapter, and how they are trained.
        tokens: Tokens of the largest micro-batch.
        processes: Number of training processes on this machine.
    """
    return processes * activation_bytes(replace(setup, recompute=False), tokens) <= SHARE * available_bytes()


def plan_activations(
    model: Any, setup: Setup | None, tokens: int, processes: int, *, recompute: bool | Literal["auto"]
) -> tuple[bool, str]:
    """Whether PEFT's layers keep activations, and the reason for the log.

    As the setting says; with `auto`, they are kept only on a CPU with enough memory. The reason is empty if the choice
    did not depend on memory.
    """
    if recompute != "auto":
        return not recompute, ""
    if model.device.type != "cpu" or setup is None:
        return False, ""
    need = processes * activation_bytes(replace(setup, recompute=False), tokens)
    keep = keeps_activations(setup, tokens, processes)
    return keep, f"activations would take {size(need, ' ')}: {'kept' if keep else 'recomputed in the backward pass'}"
