"""Being stopped: signals raise a flag, and the stages look at it where stopping is safe."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from job.errors import Preempted


class Stop:
    """A flag that says that the job has to end, and why."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __call__(self) -> bool:
        """Whether the job has to end."""
        return self.reason is not None

    def check(self) -> None:
        """Ends the stage here if the job has to end."""
        if self.reason is not None:
            raise Preempted(f"stopped by {self.reason}; start the run again with the same id to go on")


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Within it SIGTERM and SIGINT raise the flag; the second one ends the process at once.

    Handlers are needed even for the default action: a container's first process ignores signals it has no handler for.
    """
    stop = Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop():
            os._exit(Preempted.exit_code)
        stop.reason = signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
