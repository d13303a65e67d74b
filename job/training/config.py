"""The recipe, callbacks and result of training as plain values, and the exception that abandons a step. No torch.

The settings themselves are in `settings.schema` (`Train`); `stages.train` makes a `Recipe` from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from job.common.methods import MethodName
from job.data import batch_plan
from job.records import ExecutionPlan, StepMetrics, ValidationMetrics


@dataclass(frozen=True)
class Preference:
    """How to train on preferences: the settings of `train` that only these methods have, with the same names."""

    method: MethodName
    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result of training: the settings of `train`, in the form that the trainer takes.

    `total_steps` covers all epochs. `micro_batch_tokens` is the initial token budget: it affects the result only by
    rounding. How the work is carried out is in `records.ExecutionPlan`. `optimizer` is a key of
    `common.optimizers.OPTIMIZERS`, `scheduler` one of `common.schedulers.SCHEDULERS`. A `max_grad_norm` of 0 clips
    nothing.
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
    validate_every_steps: int | None = None
    """None if there is no validation."""
    stop_after: int | None = None
    keep: str = "last"
    data_seed: int | None = None
    """Seed of the order of the examples; None to use `seed`, which also seeds dropout and noise."""
    min_lr_ratio: float = 0.0
    decay_steps: int = 0
    """Steps of the final decay, for schedulers that have one; see `common/schedulers.py`."""
    neftune_noise_alpha: float = 0.0
    label_smoothing: float = 0.0
    """For `sft`; for preferences see `preference`."""
    preference: Preference | None = None
    """None for `sft`, whose loss is summed over all target tokens."""


@dataclass(frozen=True)
class Hooks:
    """Callbacks of training.

    Attributes:
        on_metrics: Called with the metrics of each step.
        on_save: Called with the folder of a written checkpoint, and its step.
        stop: Whether the job has to stop.
        has_time: If so, whether there is time to compute the given share of a step and to save a checkpoint after it.
        on_write: Called with the seconds that writing a checkpoint to the local disk took.
        on_validation: Called with the metrics of each validation.
        on_progress: Called a few times during a validation, and at each layer of a long row.
        place_of: File and line of a training row with this number of tokens, for a message; empty if not known.
    """

    on_metrics: Callable[[StepMetrics], None]
    on_save: Callable[[Path, int], None]
    stop: Callable[[], bool]
    has_time: Callable[[float], bool] = lambda _share: True
    on_write: Callable[[float], None] = lambda _seconds: None
    on_validation: Callable[[ValidationMetrics], None] = lambda _metrics: None
    on_progress: Callable[[], None] = lambda: None
    place_of: Callable[[int], str] = lambda _tokens: ""


@dataclass(frozen=True)
class TrainingResult:
    """The metrics of every step, whether all steps were done, and the final token budget and execution plan.

    If memory ran out, budget and plan are smaller than the initial ones. A run that stopped early is complete.
    """

    history: tuple[StepMetrics, ...]
    micro_batch_tokens: int
    complete: bool
    plan: ExecutionPlan
    validations: tuple[ValidationMetrics, ...] = ()


class StepAbandoned(Exception):
    """The current step cannot be finished; parameters and optimizer are unchanged since the step before.

    Either there is no time to finish it, or another process has ended, whose error is then `__cause__`.
    """


def total_steps(rows: int, global_batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of the run. With a fraction of an epoch, the number of steps is rounded up."""
    steps = ceil(epochs * batch_plan.steps_per_epoch(rows, global_batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The random seed of one step in one process; a hash, so that the seeds of neighbouring steps are unrelated."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "big") >> 1


CPU_MICRO_BATCH_TOKENS = 1024
"""Token budget of a micro-batch on a CPU if none is set; for GPUs see `execution_plan.choose_budget`."""
