"""Decisions by the validation losses: the best step, when training stops early, and which adapter is kept.

Pure functions of the losses, so that a restart decides like the attempt before it, and `verify` can recompute them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from job.records import ValidationMetrics, ValidationRecord


@dataclass(frozen=True)
class Progress:
    """The step and loss of the best validation so far, and the number of validations since (`stale`)."""

    best_step: int
    best_loss: float
    stale: int

    def stopped(self, stop_after: int | None) -> bool:
        """Whether training ends here; `stop_after` is JOB_TRAIN__STOP_AFTER."""
        return stop_after is not None and self.stale >= stop_after


def progress(validations: Sequence[ValidationMetrics]) -> Progress:
    """The progress after these validations, at least one; of equal losses the earliest step is the best."""
    best = min(range(len(validations)), key=lambda index: validations[index].loss)
    return Progress(validations[best].step, validations[best].loss, len(validations) - 1 - best)


def is_due(step: int, every_steps: int, total_steps: int) -> bool:
    """Whether there is a validation after `step` steps: before training (0), at every interval, and after the last."""
    return step % every_steps == 0 or step == total_steps


def due_steps(every_steps: int, total_steps: int) -> list[int]:
    """The steps with a validation in a run that does not stop early."""
    return [*range(0, total_steps, every_steps), total_steps]


def validation_record(
    validations: Sequence[ValidationMetrics], *, every_steps: int, total_steps: int, stop_after: int | None, keep: str
) -> ValidationRecord:
    """The manifest's `training.validation`, from all validations of a complete run."""
    best = progress(validations)
    last = validations[-1]
    published = validations[-1 - best.stale] if keep == "best" else last
    return ValidationRecord(
        every_steps=every_steps,
        count=len(validations),
        first_loss=validations[0].loss,
        last_loss=last.loss,
        best_loss=best.best_loss,
        best_step=best.best_step,
        stale=best.stale,
        stop_after=stop_after,
        planned_steps=total_steps,
        stopped_early=last.step < total_steps,
        keep=keep,
        kept_step=published.step,
        seconds=sum(float(validation.measured.get("seconds") or 0) for validation in validations),
        preference=published.preference,
    )
