"""Ends a job that makes no progress: stacks of all threads on stderr, the platform's failure message, exit code 74."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from job.errors import Stalled

TICKS = 10
CALLBACK_SECONDS = 10.0
_STDERR = 2  # the descriptor: `sys.stderr` may be replaced by something without one


@contextmanager
def watch(stall_seconds: float, on_stall: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields `report_progress`, a function for stages to call; without a call for `stall_seconds` the process ends.

    Time is counted in ticks of a thread, not read from a clock: after a pause of the whole process (a paused container,
    a migrated machine) only one tick has passed, and the job continues.

    While a library holds the interpreter's lock, no Python thread can run, this one included. For that case
    faulthandler's own thread, written in C, dumps the stacks after twice the time, by the clock. It can only exit
    with code 1.

    Args:
        stall_seconds: Longest time between two calls of `report_progress`.
        on_stall: Called with the message for the platform; it gets `CALLBACK_SECONDS`, and may fail.
    """
    progressed, finished = Event(), Event()
    # Here as well as in the thread, which may not run any more once the caller goes on, if that holds the lock.
    faulthandler.dump_traceback_later(2 * stall_seconds, exit=True, file=_STDERR)
    thread = Thread(target=_guard, args=(stall_seconds, progressed, finished, on_stall), name="watchdog", daemon=True)
    try:
        thread.start()
        yield progressed.set
    finally:
        finished.set()
        if thread.is_alive():
            thread.join()
        faulthandler.cancel_dump_traceback_later()


def _guard(stall_seconds: float, progressed: Event, finished: Event, on_stall: Callable[[str], None]) -> None:
    silent = 0
    while silent < TICKS:
        # It starts a thread, for which memory or the limit of processes may not suffice; this thread must not end then.
        with contextlib.suppress(RuntimeError):
            faulthandler.dump_traceback_later(2 * stall_seconds, exit=True, file=_STDERR)
        if finished.wait(stall_seconds / TICKS):
            return
        silent = 0 if progressed.is_set() else silent + 1
        if not silent:
            progressed.clear()
    what = f"no progress for {stall_seconds:g} s (JOB_TRAIN__STALL_SECONDS); the stacks of all threads are in the log"
    _end(what, on_stall)


def _end(message: str, on_stall: Callable[[str], None]) -> None:
    """Ends the process even if the callback hangs: it may block on the same log or file that stalled the job."""
    faulthandler.cancel_dump_traceback_later()
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"\n{message}\n".encode())
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    callback = Thread(target=on_stall, args=(message,), daemon=True)
    with contextlib.suppress(RuntimeError, MemoryError):  # the system starts no more threads: the exit code has to do
        callback.start()
        callback.join(CALLBACK_SECONDS)
    os._exit(Stalled.exit_code)
