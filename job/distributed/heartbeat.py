"""Process 0 shows the others that it runs: a thread of it increases a number in the store twice a second.

A process that is stopped (SIGSTOP, a frozen container) cannot notice it, its watchdog is stopped with it, and its
connections stay open. So the others read the number while they wait, and end once it has not changed for
JOB_TRAIN__STALL_SECONDS.
"""

from __future__ import annotations

import time
from threading import Event, Thread
from typing import Any

from job import log
from job.distributed.ranks import Place
from job.errors import Stalled

_NUMBER = "beat"
"""Key of the number."""
_PAUSE_SECONDS = 0.5
_MAX_TICK_SHARE, _LEAST_TICK_SECONDS = 0.1, 2.0
"""What one call of `HeartbeatMonitor.check` counts at most: this share of the limit, as in the watchdog, but no less
than usually passes between two calls."""
_WARN_SECONDS = 30.0
"""How often the log says that process 0 does not run."""


class Heartbeat:
    """In process 0: increases the number as long as this process runs.

    Args:
        store: With a prefix for this run and this start.
    """

    def __init__(self, store: Any) -> None:
        self._store, self._stopped = store, Event()
        self._error: RuntimeError | None = None

    def start(self) -> None:
        """Increases the number once, so that it is there when the others connect to this process, and starts a thread.

        Raises:
            RuntimeError: The store cannot be reached.
        """
        self._store.add(_NUMBER, 1)
        Thread(target=self._run, name="heartbeat", daemon=True).start()

    def check(self) -> None:
        """Raises the error that has ended the thread: else the others would take this process for stopped."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(_PAUSE_SECONDS):
                self._store.add(_NUMBER, 1)
        except RuntimeError as error:
            self._error = error


class HeartbeatMonitor:
    """In the other processes: whether process 0 runs.

    Args:
        place: That of this process.
        store: As for `Heartbeat`.
        limit_seconds: How long the number may stay the same: JOB_TRAIN__STALL_SECONDS.
    """

    def __init__(self, place: Place, store: Any, limit_seconds: float) -> None:
        self._place, self._store, self._limit = place, store, limit_seconds
        self._number, self._unchanged_seconds = 0, 0.0
        self._checked = time.monotonic()
        self._warn_at = _WARN_SECONDS

    def check(self) -> None:
        """Reads the number. Called more rarely than it changes, and only once all processes have arrived.

        Raises:
            Stalled: It has not changed for the limit.
            RuntimeError: The store cannot be reached.
        """
        before, self._number = self._number, self._store.add(_NUMBER, 0)
        now = time.monotonic()
        # Not all that the clock says: this process may have been paused as well, as when a machine is migrated.
        most = max(_MAX_TICK_SHARE * self._limit, _LEAST_TICK_SECONDS)
        elapsed, self._checked = min(now - self._checked, most), now
        if self._number != before:
            self._unchanged_seconds, self._warn_at = 0.0, _WARN_SECONDS
            return
        self._unchanged_seconds += elapsed
        who = f"process 0 of this run, on {self._place.host},"
        if self._unchanged_seconds >= self._limit:
            why = "it is stopped or its machine is frozen; start the run again to resume it"
            raise Stalled(f"{who} has not run for {self._limit:g} s (JOB_TRAIN__STALL_SECONDS): {why}")
        # One process of each machine says so. As a warning, because processes other than 0 log only those.
        if self._unchanged_seconds >= self._warn_at and (self._place.local_rank == 0 or self._place.rank == 1):
            self._warn_at = self._unchanged_seconds + _WARN_SECONDS
            log.get_logger().warning(
                "waiting for process 0, which is stopped, or whose machine is frozen",
                at=self._place.host,
                seconds=round(self._unchanged_seconds),
                at_most_seconds=max(0, round(self._limit - self._unchanged_seconds)),
            )
