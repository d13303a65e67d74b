"""The figures of the manifest's `training` that follow from the metrics of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from job.records import StepMetrics


def training_totals(history: Sequence[StepMetrics], steps_per_epoch: int, global_batch_size: int) -> dict[str, Any]:
    """The totals by their names in the manifest.

    Args:
        history: The metrics of every optimizer step, each once; of a step that was repeated after a restart, those
            of the last time.
        steps_per_epoch: Optimizer steps in an epoch (`batch_plan.steps_per_epoch`).
        global_batch_size: Examples of a step.

    Returns:
        `loss` is the mean over the target tokens of the last epoch's steps, in nats (None if there are no target
        tokens); `seconds` are those within steps; `tokens_per_second` counts target tokens.
    """
    last_epoch = history[-steps_per_epoch:]
    targets, learned = (sum(step.target_tokens for step in steps) for steps in (history, last_epoch))
    seconds = sum(float(step.measured.get("seconds") or 0) for step in history)
    return {
        "steps": len(history),
        "examples": sum(step.examples for step in history),
        "target_tokens": targets,
        "loss": sum(step.loss * step.target_tokens for step in last_epoch) / learned if learned else None,
        "seconds": seconds,
        "tokens_per_second": targets / seconds if seconds else None,
        "peak_memory_bytes": max((int(step.measured.get("memory_bytes") or 0) for step in history), default=0),
        "global_batch_size": global_batch_size,
    }
