"""Callbacks of transformers' Trainer: around the optimizer's step, for the stop flag, and for validations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class AroundOptimizerStep(TrainerCallback):  # type: ignore[misc]
    """Calls `before` and `after` around each `optimizer.step()`, while the gradient still exists.

    Args:
        before: Called when the gradient is clipped, before `optimizer.step()`.
        after: Called after `optimizer.step()`, with the number of steps done, this one included.
    """

    def __init__(self, before: Callable[[], None], after: Callable[[int], None]) -> None:
        self.before, self.after = before, after

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Called by Trainer when the gradient is clipped."""
        self.before()

    def on_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Called by Trainer after `optimizer.step()`."""
        self.after(state.global_step + 1)  # Trainer increments it later


class StopOnFlag(TrainerCallback):  # type: ignore[misc]
    """Once the stop flag is set, ends training after the current step, and saves its state if there is time.

    Args:
        stop: Whether the job has to stop.
        has_time: `Hooks.has_time`.
    """

    def __init__(self, stop: Callable[[], bool], has_time: Callable[[float], bool]) -> None:
        self.stop, self.has_time = stop, has_time

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Checks the flag; called by Trainer after each step."""
        if self.stop():
            control.should_training_stop = True
            control.should_save = self.has_time(0.0)


class ValidateOnSchedule(TrainerCallback):  # type: ignore[misc]
    """Validates before the first step of an attempt if a validation is due, and makes Trainer validate after steps.

    Args:
        due: Whether a validation of the current state is due and was not made yet.
        validate: Validates.
    """

    def __init__(self, due: Callable[[], bool], validate: Callable[[], object]) -> None:
        self.due, self.validate = due, validate

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Validates at step 0, or at a checkpoint's step if the attempt before stopped during that validation."""
        if self.due():
            self.validate()

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Makes Trainer validate, which it does between the step's metrics and its checkpoint."""
        control.should_evaluate = control.should_evaluate or self.due()
