"""How long the remaining steps of training will take."""

from __future__ import annotations

import time
from collections import deque

_INTERVALS = 20
"""Intervals between steps that the estimate is the mean of."""


class StepPace:
    """Estimates the remaining time from the last steps.

    It goes by the wall clock from step to step, so that validations, checkpoints and waits are part of it. The first
    step of an attempt is not: it may compile kernels and capture CUDA graphs.
    """

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._ends: deque[float] = deque(maxlen=_INTERVALS + 1)

    def remaining_seconds(self, step: int) -> float | None:
        """To be called at the end of each step; None at the first, when there is nothing to measure yet."""
        self._ends.append(time.monotonic())
        intervals = len(self._ends) - 1
        if not intervals:
            return None
        return (self._ends[-1] - self._ends[0]) / intervals * max(0, self._total - step)
