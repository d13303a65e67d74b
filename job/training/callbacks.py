"""The trainer's callbacks. They hold no logic: they carry flags into the trainer's control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class StopOnFlag(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step in hand once the flag is up, with its state saved where there is time for that."""

    def __init__(self, stop: Callable[[], bool], fits: Callable[[float], bool]) -> None:
        self.stop, self.fits = stop, fits

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Reads the flag."""
        if self.stop():
            control.should_training_stop = True
            control.should_save = self.fits(0.0)
