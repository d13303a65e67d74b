"""The stop flag: signals and spot notices set it, with a deadline; stages check it where they can stop safely.

What happens on SIGTERM:

1. The handler of `stop_on_signals` sets the flag, and the deadline by JOB_RUN__GRACE_SECONDS.
2. In training, `training.step` looks at it between two micro-batches, and when a step ends of which the host has
   launched the next one already (`training.launch_ahead`); `StopOnFlag` of `training.trainer_callbacks` after a step.
   `decide` says what still fits before the deadline: the rest of the step and a checkpoint, a checkpoint of the step
   before, or neither. `stages.train` waits for the upload until shortly before the deadline.
3. All other stages call `Attempt.check_stop`, which raises `Preempted`; what they have computed in part is cached.
4. `cli.main` turns `Preempted` into exit code 75. What still waits right before the deadline, as for a store, is ended
   with it. The next attempt of the run resumes, see `pipeline`.
"""

from __future__ import annotations

import math
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from threading import Thread
from types import FrameType
from typing import Literal

from job import log
from job.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""A platform's or a person's. HUP comes from a dropped terminal session; USR1 from Slurm, USR2 from LSF and Grid Engine
before a time limit; XCPU from them and from the kernel at a limit of CPU time."""

SAME_REQUEST_SECONDS = 1.0
"""Signals within this time after the first are the same request. A process gets one twice where it is sent to all
processes of a group or a service, and by the parent as well: from timeout, systemd, scancel, or a terminal that is
closed."""

StopPlan = Literal["finish_step", "save_now", "too_late"]

SPARE_SHARE = 0.25
SPARE_SECONDS = 2.0
"""Margin of `decide`: machines slow down while they are drained, and the run log is still to be written at the end."""
LAST_SECONDS = 0.5
"""A process that has not ended by this time before the kill ends itself."""
_LONGEST_WAIT = 3600.0
"""Seconds; `poll` takes no more than 24 days."""
_GOES_ON = "start the run again with its JOB_RUN__ID: it goes on after its last checkpoint or finished stage"
_NO_MORE_SIGNALS = b"\0"
"""Written to the pipe of signal numbers when it is not read any more; no signal has this number."""


class StopFlag:
    """Whether the job has to end, for which reason, and until when.

    Any thread and any signal handler may call `request`. There is no lock: a signal handler that interrupts the thread
    that holds the lock would deadlock. Appending to a list is atomic, and readers compute the rest from the list.
    """

    def __init__(self) -> None:
        self._requests: list[tuple[str, float]] = []

    def __call__(self) -> bool:
        """Whether the job has to end."""
        return bool(self._requests)

    def request(self, reason: str, deadline_seconds: float | None = None) -> None:
        """Asks the job to end.

        Args:
            reason: What asks, for the message; the first reason is kept.
            deadline_seconds: Seconds from now until the kill, None if unknown. The earliest deadline counts.
        """
        seconds = math.inf if deadline_seconds is None else deadline_seconds
        self._requests.append((reason, time.monotonic() + seconds))

    @property
    def reason(self) -> str | None:
        """The reason of the first request; None while there is none."""
        return self._requests[0][0] if self._requests else None

    @property
    def deadline(self) -> float:
        """When the process is killed, on the clock of `time.monotonic`; infinity while that is unknown."""
        return min((deadline for _, deadline in self._requests), default=math.inf)

    def remaining(self) -> float:
        """Seconds until the deadline, never negative; infinity while there is none."""
        return max(0.0, self.deadline - time.monotonic())

    def waiting_seconds(self) -> float:
        """How long something may be waited for: until `SPARE_SECONDS` before the deadline, for the end to be recorded.

        Never negative; infinity while there is no deadline.
        """
        return max(0.0, self.remaining() - SPARE_SECONDS)

    def check(self) -> None:
        """Ends the stage if the job has to end.

        Raises:
            Preempted: `request` was called.
        """
        if self.reason is not None:
            raise Preempted(f"stopped by {self.reason}; start the run again with its JOB_RUN__ID to resume it")


@dataclass(frozen=True)
class Timings:
    """The longest of the last few durations of each kind, in seconds; 0 if there is none yet in this attempt."""

    step: float = 0.0
    save: float = 0.0
    upload: float = 0.0


class Stopwatch:
    """Keeps the last `window` durations of a step, of saving and of uploading a checkpoint."""

    def __init__(self, window: int = 8) -> None:
        self._kept = {name: deque[float](maxlen=window) for name in ("step", "save", "upload")}

    def add(self, activity: Literal["step", "save", "upload"], seconds: float) -> None:
        """Adds a duration."""
        self._kept[activity].append(seconds)

    @property
    def timings(self) -> Timings:
        """The longest of each kind: half of the steps take longer than their average."""
        return Timings(**{name: max(kept, default=0.0) for name, kept in self._kept.items()})


def decide(timings: Timings, remaining: float, step_left: float = 1.0) -> StopPlan:
    """What still fits before the deadline, with a margin of `SPARE_SHARE` and `SPARE_SECONDS`.

    Args:
        timings: Seconds that a step, saving a checkpoint and uploading it take.
        remaining: Seconds until the deadline.
        step_left: Fraction of the current step that is not done: from 0 (between two steps) to 1.

    Returns:
        `finish_step`: finish the current step, then save and upload a checkpoint. `save_now`: abandon the step, save
        and upload the checkpoint of the one before. `too_late`: end at once; the last uploaded checkpoint will be
        restored.
    """
    publish = timings.save + timings.upload
    if step_left > 0 and _in_time(step_left * timings.step + publish, remaining):
        return "finish_step"
    return "save_now" if _in_time(publish, remaining) else "too_late"


def _in_time(seconds: float, remaining: float) -> bool:
    return seconds * (1 + SPARE_SHARE) + SPARE_SECONDS <= remaining


def signals_to_handle() -> list[signal.Signals]:
    """`SIGNALS` without those that the parent process set to be ignored, as nohup does with HUP."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _warn(message: str) -> int:
    log.get_logger().warning(message)
    return Preempted.exit_code


@contextmanager
def stop_on_signals(
    grace_seconds: float | None = None, report: Callable[[str], int] = _warn, *, says_end: bool = True
) -> Iterator[StopFlag]:
    """Within it each of `SIGNALS` sets the flag; a second request, by a later signal, ends the process at once.

    It says so in a line of the log, but records nothing: `qlora-job status` sees on the same machine that it is gone.

    `LAST_SECONDS` before the kill the process ends itself, with the exit code of a preemption, even while it waits: a
    store that throttles may keep it waiting for minutes, and a killed process (137) looks like one that ran out of
    memory.

    Ending at once corrupts nothing, because publishing is atomic. Without a handler nothing would happen in a
    container: its first process ignores signals that it has no handler for. XCPU is never a second request, because
    the kernel repeats it every second of CPU time.

    Args:
        grace_seconds: Time between the signal and the kill; None if unknown.
        report: Called with the reason when the process ends itself before the kill; returns the exit code. It runs in
            a separate thread and gets most of `LAST_SECONDS`: what it writes to may be what the process waits for.
        says_end: Whether a second request is logged; one of several processes of a machine does it.
    """
    stop = StopFlag()
    times: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        times.append(time.monotonic())
        if len(times) == 1:  # spot notices do not count here: the first SIGTERM after one still gets its grace period
            stop.request(signal.Signals(number).name, grace_seconds)
        elif number != signal.SIGXCPU and times[-1] - times[0] > SAME_REQUEST_SECONDS:
            if says_end:
                what = f"a second signal ({signal.Signals(number).name}) ends the process at once, without saving"
                log.write_line(f"{what}; {_GOES_ON}", exit_code=Preempted.exit_code)
            os._exit(Preempted.exit_code)

    numbers = signals_to_handle()
    with nullcontext() if grace_seconds is None else _exiting_before_kill(grace_seconds, numbers, report):
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _exiting_before_kill(grace: float, numbers: Collection[int], report: Callable[[str], int]) -> Iterator[None]:
    """Within it a thread ends the process before the kill that follows one of these signals.

    Python calls a handler between two instructions of the main thread, so not while that waits in a library's code.
    What the thread reads is written by the interpreter's own handler, in C, when the signal arrives.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    run, arguments = copy_context().run, (_exit_before_kill, reading, grace, numbers, report)
    # Not started by the handler, where that may deadlock. With the context, whose fields are on the lines of the log.
    Thread(target=run, args=arguments, name="grace", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_descriptor)
        os.write(writing, _NO_MORE_SIGNALS)
        os.close(writing)


# Else a signal to a forked process would be taken for one to this process.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _exit_before_kill(reading: int, grace: float, numbers: Collection[int], report: Callable[[str], int]) -> None:
    margin = min(LAST_SECONDS, grace / 2)
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    first, end = 0.0, math.inf
    what = "the process ends without waiting any longer: the grace period is over (JOB_RUN__GRACE_SECONDS)"
    while (left := end - time.monotonic()) > 0:
        if not poll.poll(1000 * min(left, _LONGEST_WAIT)):
            continue
        if (received := os.read(reading, 1)) == _NO_MORE_SIGNALS:
            os.close(reading)
            return
        now = time.monotonic()
        if received[0] not in numbers:
            continue
        if end == math.inf:
            first, end = now, now + grace - margin
        elif received[0] != signal.SIGXCPU and now - first > SAME_REQUEST_SECONDS and now + LAST_SECONDS < end:
            # The handler ends the process sooner where it is called.
            end, what = now + LAST_SECONDS, f"a second signal ends the process at once; {_GOES_ON}"
    codes: list[int] = []
    reporting = Thread(target=copy_context().run, args=(lambda: codes.append(report(what)),), daemon=True)
    reporting.start()
    reporting.join(0.8 * margin)
    os._exit(codes[0] if codes else Preempted.exit_code)
