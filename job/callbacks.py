"""The trainer's callbacks. They hold no logic: they carry a flag into the trainer's control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class StopOnFlag(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step in hand, with its state saved, once the flag is up."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Reads the flag."""
        if self.stop():
            control.should_save = control.should_training_stop = True
