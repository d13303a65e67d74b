"""Which settings decide the result of a run, and which only how it is carried out."""

from __future__ import annotations

from typing import Any

from job.settings.load import Settings, describe

# These change how a run is carried out, never what it computes; an attempt may differ in them from the one before.
EXECUTION = {
    *("run.id", "run.output", "run.grace_seconds", "run.spot_notices", "run.device", "run.image_digest", "preset"),
    *("run.processes", "run.nodes", "run.node_rank", "run.rendezvous", "train.micro_batch_tokens", "eval.batch_tokens"),
    *("fault", "train.log_every_steps", "train.stall_seconds", "train.gradient_checkpointing"),
    *("train.gpu_memory_gb", "model.keep_dequantized", "model.keep_quantized"),
}


EXECUTION_GROUPS = ("storage.", "log.", "cost.", "checkpoint.", "gate.")


def decisive_settings(settings: Settings) -> dict[str, Any]:
    """The settings that decide the result."""
    return {name: value for name, value in plain_values(settings).items() if affects_result(name)}


def plain_values(settings: Settings) -> dict[str, Any]:
    """Value of every setting by dotted name, without secrets."""
    return {name: value for name, value, _ in describe(settings)}


def affects_result(name: str) -> bool:
    """Whether a setting, by its dotted name, decides the result."""
    return name not in EXECUTION and not name.startswith(EXECUTION_GROUPS)
