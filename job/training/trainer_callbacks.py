"""What transformers' Trainer calls around the optimizer's step and after a step: the stop flag, due validations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class AroundOptimizerStep(TrainerCallback):  # type: ignore[misc]
    """Calls `before` each optimizer step, and `after` it, while the gradient is still there.

    Args:
        before: Called after clipping.
        after: Called with the number of steps done.
    """

    def __init__(self, before: Callable[[], None], after: Callable[[int], None]) -> None:
        self.before, self.after = before, after

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Trainer has clipped the gradient."""
        self.before()

    def on_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """The step is not counted yet."""
        self.after(state.global_step + 1)


class StopOnFlag(TrainerCallback):  # type: ignore[misc]
    """Once the stop flag is set, ends training after the current step, and saves its state if there is time.

    Args:
        stop: Whether the job has to stop.
        has_time: `Hooks.has_time`.
    """

    def __init__(self, stop: Callable[[], bool], has_time: Callable[[float], bool]) -> None:
        self.stop, self.has_time = stop, has_time

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Reads the flag."""
        if self.stop():
            control.should_training_stop = True
            control.should_save = self.has_time(0.0)


class ValidateOnSchedule(TrainerCallback):  # type: ignore[misc]
    """Validates before the first step of an attempt, where that is due, and has Trainer do so after later steps.

    Args:
        due: Whether the last step has a validation that was not made yet.
        validate: Makes it.
    """

    def __init__(self, due: Callable[[], bool], validate: Callable[[], object]) -> None:
        self.due, self.validate = due, validate

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Before training; or after the step that a checkpoint is of, where an attempt stopped in its validation."""
        if self.due():
            self.validate()

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Asks Trainer for a validation between the step's metrics and its checkpoint."""
        control.should_evaluate = control.should_evaluate or self.due()
