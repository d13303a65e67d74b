"""Finds the base's files in a thread, while the other inputs are checked and the rows are read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.common.threads import in_thread
from job.errors import JobError, Preempted
from job.runs.attempt import Attempt
from job.stages.pull_model import BaseFiles, BaseSettings, find_base
from job.storage.hub import import_client
from job.storage.open import StorageOptions

_POLL_SECONDS = 0.5
_CLEANUP_SECONDS = 3.0


@dataclass(frozen=True)
class BackgroundBase:
    """The base's files as the thread finds them: first the small ones, then the weights.

    Attributes:
        attempt: Its stop flag is checked while the caller waits.
        early: Folder of configuration and tokenizer, and whether weights are still to be downloaded.
        may_download: The thread waits for this before it downloads weights.
        all_files: All files, including the weights.
    """

    attempt: Attempt
    early: Future[tuple[Path, bool]]
    may_download: Future[None]
    all_files: Future[BaseFiles]

    def small_files(self) -> tuple[Path, bool]:
        """The folder with configuration and tokenizer, and whether the weights are still to be downloaded."""
        wait_for(self.attempt, self.early, self.all_files)
        return self.early.result() if self.early.done() else (self.all_files.result().folder, False)

    def download_weights(self) -> None:
        """Lets the thread download weights; called once everything that does not need them is checked."""
        self.may_download.set_result(None)

    def files(self) -> BaseFiles:
        """Waits for all files and returns them."""
        files: BaseFiles = wait_for(self.attempt, self.all_files)
        return files

    def check_stop(self, *, progress: bool = True) -> None:
        """As `Attempt.check_stop`, for work during the download; also raises the error of a failed download."""
        self.attempt.check_stop(progress=progress)
        if self.all_files.done():
            self.all_files.result()


@contextmanager
def base_in_background(attempt: Attempt, base: BaseSettings, storage: StorageOptions) -> Iterator[BackgroundBase]:
    """Starts a thread that finds the base's files. If the other inputs fail, it downloads no weights.

    Downloading and hashing release the GIL, so imports and the reading of rows continue meanwhile.

    Args:
        attempt: Files from a store are copied into its work folder.
        base: Which base to find, and for what.
        storage: How to reach stores.
    """
    import_client()  # before the thread starts: two threads that import a module at once may see it half initialized
    early: Future[tuple[Path, bool]] = Future()
    may_download: Future[None] = Future()

    def before_weights(folder: Path, missing: bool) -> None:  # noqa: FBT001 - hub.download_model calls it so
        early.set_result((folder, missing))
        if missing:
            may_download.result()

    base_files = in_thread(lambda: find_base(attempt, base, storage, before_weights), "model")
    try:
        yield BackgroundBase(attempt, early, may_download, base_files)
    except JobError as error:
        may_download.cancel()
        if isinstance(error, Preempted):
            wait([base_files], _CLEANUP_SECONDS)  # the thread removes a partial copy of a quantized base
        raise


def wait_for(attempt: Attempt, *futures: Future[Any]) -> Any:
    """The result of the first future that is done.

    Raises:
        Preempted: The job was asked to stop, even during a long download.
        Exception: What the future raised.
    """
    while not (done := wait(futures, _POLL_SECONDS, FIRST_COMPLETED).done):
        attempt.check_stop(progress=False)
    return next(future for future in futures if future in done).result()
