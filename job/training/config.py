"""How to train, as plain values: what the trainer is given, whom it tells, and what it gives back. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from job.data import batch_plan
from job.records import StepMetrics


@dataclass(frozen=True)
class Recipe:
    """How to train: the settings of `train`, as the trainer takes them. `total_steps` covers all epochs."""

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
    gradient_checkpointing: bool
    save_every_steps: int
    autocast: bool = True
    """Whether a half-precision model needs autocast: where PEFT's own layers multiply by the adapter's fp32 weights."""
    padded: bool = False
    """Whether rows are padded to few lengths; only for a model made lean throughout, in no autocast."""
    replayed: bool = False
    """Whether a GPU's work for padded rows is recorded and replayed."""
    kept_base: bool = False
    """Whether the base's weights are kept dequantized."""


@dataclass(frozen=True)
class Hooks:
    """What the trainer calls: with the metrics of a step, with a saved state, and to ask whether to stop.

    `fits` is asked once the job has to stop: is there time to do the given share of a step and to save after it?
    `on_write` is told how many seconds it took to write a state to the local disk.
    """

    on_metrics: Callable[[StepMetrics], None]
    on_save: Callable[[Path, int], None]
    stop: Callable[[], bool]
    fits: Callable[[float], bool] = lambda _share: True
    on_write: Callable[[float], None] = lambda _seconds: None


@dataclass(frozen=True)
class Trained:
    """Every step's metrics, the micro-batch budget that was left in the end, and whether all steps were done.

    `given_up`: fields of `Execution` that held in the beginning, and did not when memory had run out.
    """

    history: tuple[StepMetrics, ...]
    micro_batch_tokens: int
    complete: bool
    given_up: tuple[str, ...] = ()


def total_steps(rows: int, global_batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of the run."""
    steps = epochs * batch_plan.steps_per_epoch(rows, global_batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seeds the randomness of one step in one process; a hash, so that neighbouring steps share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "big") >> 1


CPU_MICRO_BATCH_TOKENS = 1024
"""Token budget of a micro-batch where none is set; on a GPU see `execution`."""


def substitute(recipe: Recipe, device: str) -> tuple[Recipe, list[str]]:
    """Replaces what this device has no implementation of by its nearest equivalent, and says so."""
    if device == "cpu" and recipe.optimizer.startswith("paged_"):
        nearest = recipe.optimizer.removeprefix("paged_")
        return replace(recipe, optimizer=nearest), [f"optimizer {recipe.optimizer} -> {nearest}: a CPU pages nothing"]
    return recipe, []
