"""What training is given, calls and returns, as plain values. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job.data import batch_plan
from job.records import ExecutionPlan, StepMetrics


@dataclass(frozen=True)
class Recipe:
    """What decides the result of training: the settings of `train`, as the trainer takes them.

    `total_steps` covers all epochs. `micro_batch_tokens` is the budget to begin with: it decides last bits only.
    How the work is carried out is in `records.ExecutionPlan`. `optimizer` is a key of `common.optimizers.OPTIMIZERS`.
    """

    seed: int
    total_steps: int
    learning_rate: float
    scheduler: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    global_batch_size: int
    micro_batch_tokens: int
    optimizer: str
    save_every_steps: int


@dataclass(frozen=True)
class Hooks:
    """What training calls: with the metrics of a step, with a written checkpoint and its step, and to ask `stop`.

    `fits` is asked once the job has to stop: is there time to do the given share of a step and to save after it?
    `on_write` gets the seconds that it took to write a checkpoint to the local disk.
    """

    on_metrics: Callable[[StepMetrics], None]
    on_save: Callable[[Path, int], None]
    stop: Callable[[], bool]
    fits: Callable[[float], bool] = lambda _share: True
    on_write: Callable[[float], None] = lambda _seconds: None


@dataclass(frozen=True)
class Trained:
    """Every step's metrics, whether all steps were done, and the budget and the plan as they were in the end.

    Where memory ran out, these are less than what training began with.
    """

    history: tuple[StepMetrics, ...]
    micro_batch_tokens: int
    complete: bool
    plan: ExecutionPlan


def total_steps(rows: int, global_batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of the run."""
    steps = epochs * batch_plan.steps_per_epoch(rows, global_batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seeds the randomness of one step in one process; a hash, so that neighbouring steps share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "big") >> 1


CPU_MICRO_BATCH_TOKENS = 1024
"""Token budget of a micro-batch where none is set; on a GPU see `execution_plan.choose_budget`."""
