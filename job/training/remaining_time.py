"""How long the remaining steps of training will take."""

from __future__ import annotations

import time
from collections import deque

_INTERVALS = 20
"""Number of last intervals between steps whose mean is the estimate."""


class StepPace:
    """Estimates the remaining time from the last steps.

    Measured by the wall clock from step to step, so validations, checkpoints and waits are included. The first step of
    an attempt is excluded: it may compile kernels and capture CUDA graphs.
    """

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._ends: deque[float] = deque(maxlen=_INTERVALS + 1)

    def remaining_seconds(self, step: int) -> float | None:
        """The estimate, to be called at the end of each step; None at the first, when there is no interval yet."""
        self._ends.append(time.monotonic())
        intervals = len(self._ends) - 1
        if not intervals:
            return None
        return (self._ends[-1] - self._ends[0]) / intervals * max(0, self._total - step)
