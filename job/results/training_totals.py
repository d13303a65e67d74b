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
    by_examples = any(step.preference for step in last_epoch)  # the loss of a step of preferences is a mean over these
    weights = [step.examples if by_examples else step.target_tokens for step in last_epoch]
    means = _means(last_epoch)
    seconds = sum(float(step.measured.get("seconds") or 0) for step in history)
    return {
        "steps": len(history),
        "examples": sum(step.examples for step in history),
        "target_tokens": targets,
        "loss": sum(step.loss * weight for step, weight in zip(last_epoch, weights, strict=True)) / sum(weights)
        if learned
        else None,
        "seconds": seconds,
        "tokens_per_second": targets / seconds if seconds else None,
        "peak_memory_bytes": max((int(step.measured.get("memory_bytes") or 0) for step in history), default=0),
        "global_batch_size": global_batch_size,
        **({"preference": means} if means else {}),
    }


def _means(history: Sequence[StepMetrics]) -> dict[str, float]:
    """The means of the metrics of preferences, by examples; a metric may be missing in some steps."""
    names = dict.fromkeys(name for step in history for name in step.preference)
    means = {}
    for name in names:
        values = [(step.preference[name], step.examples) for step in history if name in step.preference]
        means[name] = sum(value * examples for value, examples in values) / sum(examples for _, examples in values)
    return means
