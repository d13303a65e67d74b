"""Uploads during training: one thread uploads a finished checkpoint while the next steps are computed.

At most one upload is under way: handing over a checkpoint waits for the one before. A failed upload is an error of the
run, raised in the training thread at its next call. Leaving the `with` block waits for the upload under way, because
it would not go on once the process has ended. The store's time limits bound that wait.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Self

from job.common.threads import in_thread
from job.log import get_logger

# So many durations of uploads predict how long the next one takes.
_DURATIONS_KEPT = 8
_POLL_SECONDS = 0.5


class AsyncUploader:
    """Hands checkpoints to `commit`, one at a time, in another thread. For one training thread to use.

    Args:
        commit: Uploads the folder of a step and commits it; raises the error that the run is to end with.
        seconds_left: Returns how many more seconds to wait for the upload under way when an exception leaves the
            `with` block. Called repeatedly while waiting, because a signal may shorten the time.
    """

    def __init__(
        self, commit: Callable[[Path, int], None], *, seconds_left: Callable[[], float] = lambda: math.inf
    ) -> None:
        self._commit = commit
        self._seconds_left = seconds_left
        self._upload: Future[None] | None = None
        self._seconds: deque[float] = deque(maxlen=_DURATIONS_KEPT)
        self.waited_seconds = 0.0
        """How long the training thread was held up, in all."""

    @property
    def seconds(self) -> tuple[float, ...]:
        """How long the latest uploads took, oldest first."""
        return tuple(self._seconds)

    def submit(self, folder: Path, step: int) -> None:
        """Commits a finished checkpoint, whose folder is deleted when that is done; waits for the one before.

        Raises:
            Exception: What the upload of an earlier one failed with. Nothing is committed after a failure.
        """
        self.finish()
        # No daemon: a process that ends early still waits for an upload that is under way.
        self._upload = in_thread(lambda: self._run(folder, step), "publisher", daemon=False)

    def check(self) -> None:
        """Raises what an upload failed with, without waiting for one."""
        if self._upload is not None and self._upload.done():
            self._upload.result()

    def finish(self, timeout: float | None = None) -> bool:
        """Waits until what was submitted is committed.

        Args:
            timeout: Seconds to wait at most; None for as long as the store's own time limits allow.

        Returns:
            Whether it is; False when the time was up.

        Raises:
            Exception: What the upload failed with.
        """
        if self._upload is None:
            return True
        began = time.monotonic()
        done, _ = wait([self._upload], timeout)
        self.waited_seconds += time.monotonic() - began
        self.check()
        return bool(done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._upload is not None:
            # The exception is what the run ends with; the upload under way is still given its time.
            began = time.monotonic()
            while not wait([self._upload], min(_POLL_SECONDS, self._seconds_left())).done and self._seconds_left() > 0:
                pass
            self._log_how_it_ended(self._upload, error, time.monotonic() - began)

    def _log_how_it_ended(self, upload: Future[None], error: BaseException | None, waited: float) -> None:
        if not upload.done():
            get_logger().warning("the upload of the last checkpoint did not end in time", waited=round(waited, 1))
        elif (failure := upload.exception()) not in {None, error}:
            get_logger().warning("the upload of the last checkpoint failed too", error=str(failure))

    def _run(self, folder: Path, step: int) -> None:
        began = time.monotonic()
        self._commit(folder, step)
        self._seconds.append(time.monotonic() - began)
        shutil.rmtree(folder, ignore_errors=True)
