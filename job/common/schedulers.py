"""The schedules of the learning rate that a run can choose: one table, from which settings and trainer read.

To add one: an entry in `SCHEDULERS`, with its name in transformers and the options that `transformers.get_scheduler`
takes for it. `tests/unit/training/test_schedulers.py` compares every entry with transformers.

No torch: the choices are among the settings, which must answer before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps of a run: the settings, with all shares converted to steps."""

    total_steps: int
    warmup_steps: int
    min_lr_ratio: float
    decay_steps: int


@dataclass(frozen=True)
class SchedulerSpec:
    """`transformers_name` is its `lr_scheduler_type` for a schedule, `options` its `lr_scheduler_kwargs`."""

    transformers_name: Callable[[Schedule], str]
    options: Callable[[Schedule], dict[str, Any]] = lambda _: {}
    has_minimum: bool = False
    """Whether `JOB_TRAIN__MIN_LR_RATIO` has an effect."""


SCHEDULERS: Mapping[str, SchedulerSpec] = {
    "linear": SchedulerSpec(lambda _: "linear"),
    # Without a minimum it is the plain one, whose last bits are those of earlier versions of the job.
    "cosine": SchedulerSpec(
        lambda schedule: "cosine_with_min_lr" if schedule.min_lr_ratio else "cosine",
        lambda schedule: {"min_lr_rate": schedule.min_lr_ratio} if schedule.min_lr_ratio else {},
        has_minimum=True,
    ),
    "constant": SchedulerSpec(lambda _: "constant_with_warmup"),
    "warmup_stable_decay": SchedulerSpec(
        lambda _: "warmup_stable_decay",
        lambda schedule: {"num_decay_steps": schedule.decay_steps, "min_lr_ratio": schedule.min_lr_ratio},
        has_minimum=True,
    ),
}

if TYPE_CHECKING:
    SchedulerName = str
else:
    SchedulerName = Literal[tuple(SCHEDULERS)]
    """The type of the setting: the table's keys, which a type checker cannot see."""


def count_warmup_steps(total_steps: int, warmup_steps: int, warmup_ratio: float | None) -> int:
    """Steps in which the learning rate rises. If they are all steps of the run, it never reaches its peak."""
    return warmup_steps if warmup_ratio is None else ceil(warmup_ratio * total_steps)


def make_schedule(
    total_steps: int, *, warmup_steps: int, warmup_ratio: float | None, min_lr_ratio: float, decay_ratio: float
) -> Schedule:
    """The schedule of a run of `total_steps` steps; warmup and decay never overlap: the warmup comes first."""
    warmup = count_warmup_steps(total_steps, warmup_steps, warmup_ratio)
    decay = min(ceil(decay_ratio * total_steps), max(0, total_steps - warmup))
    return Schedule(total_steps, warmup, min_lr_ratio, decay)
