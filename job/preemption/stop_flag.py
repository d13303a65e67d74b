"""Being stopped: signals and notices raise a flag with a deadline, and the stages look at it where stopping is safe."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from job.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""A platform's or a person's; HUP comes from a dropped terminal session, USR1 from Slurm before a time limit."""

Plan = Literal["finish_step", "save_now", "too_late"]

SPARE_SHARE = 0.25
SPARE_SECONDS = 2.0
"""Kept free for what was not measured: machines slow down while they are drained, and the ledger is written last."""


class Stop:
    """A flag that says that the job has to end, why, and until when.

    Any thread and any signal handler may raise it. There is no lock, because a handler that interrupts the thread that
    holds a lock would wait for ever: appending to a list is atomic, and everything else is worked out by the reader.
    """

    def __init__(self) -> None:
        self._requests: list[tuple[str, float]] = []

    def __call__(self) -> bool:
        """Whether the job has to end."""
        return bool(self._requests)

    def request(self, reason: str, deadline_seconds: float | None = None) -> None:
        """Asks the job to end.

        Args:
            reason: Who asks, for the message; the first one is kept.
            deadline_seconds: Seconds from now until the kill; None where nobody said. The earliest deadline holds.
        """
        seconds = math.inf if deadline_seconds is None else deadline_seconds
        self._requests.append((reason, time.monotonic() + seconds))

    @property
    def reason(self) -> str | None:
        """Who asked first; None while nobody has."""
        return self._requests[0][0] if self._requests else None

    @property
    def deadline(self) -> float:
        """On the clock of `time.monotonic`: when the process is killed; infinity while nobody has said."""
        return min((deadline for _, deadline in self._requests), default=math.inf)

    def remaining(self) -> float:
        """Seconds until the deadline, never negative; nothing may be begun that takes longer."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Ends the stage here if the job has to end."""
        if self.reason is not None:
            raise Preempted(f"stopped by {self.reason}; start the run again with the same id to go on")


@dataclass(frozen=True)
class Timings:
    """The longest of the last few durations, in seconds; 0 for what this attempt has not done yet."""

    step: float = 0.0
    save: float = 0.0
    upload: float = 0.0


class Stopwatch:
    """Keeps the last few durations of what a stop may still have to do."""

    def __init__(self, window: int = 8) -> None:
        self._kept = {name: deque[float](maxlen=window) for name in ("step", "save", "upload")}

    def add(self, what: Literal["step", "save", "upload"], seconds: float) -> None:
        """Notes that something took so long."""
        self._kept[what].append(seconds)

    @property
    def timings(self) -> Timings:
        """The longest of each: an average would be missed half of the time."""
        return Timings(**{name: max(kept, default=0.0) for name, kept in self._kept.items()})


def decide(timings: Timings, remaining: float, step_left: float = 1.0) -> Plan:
    """What still fits before the deadline.

    Args:
        timings: How long a step, saving a state and uploading a checkpoint take.
        remaining: Seconds until the deadline.
        step_left: Share of the step in hand that is not done, from 0 (between two steps) to 1.

    Returns:
        `finish_step`: finish the step in hand, then save and upload. `save_now`: abandon it, save and upload the state
        after the step before. `too_late`: end at once, what was uploaded last is what will be restored.
    """
    publish = timings.save + timings.upload
    if step_left > 0 and _fits(step_left * timings.step + publish, remaining):
        return "finish_step"
    return "save_now" if _fits(publish, remaining) else "too_late"


def _fits(seconds: float, remaining: float) -> bool:
    return seconds * (1 + SPARE_SHARE) + SPARE_SECONDS <= remaining


def signals_to_handle() -> list[signal.Signals]:
    """`SIGNALS` without those that whoever started the process wants ignored, as nohup does with HUP."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def stop_on_signals(grace_seconds: float | None = None) -> Iterator[Stop]:
    """Within it `SIGNALS` raise the flag; the second one ends the process at once.

    Ending at once corrupts nothing, because everything that is published appears whole or not at all.
    Handlers are needed even for the default action: a container's first process ignores signals it has no handler for.

    Args:
        grace_seconds: Time between the signal and the kill; None where it is not known.
    """
    stop = Stop()
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:  # a notice is no signal: the first SIGTERM after one still has its grace
            os._exit(Preempted.exit_code)
        stop.request(signal.Signals(number).name, grace_seconds)

    before = {number: signal.signal(number, handle) for number in signals_to_handle()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
