"""The folder on this machine for an attempt's temporary files, and those that killed attempts left behind.

A killed process cannot remove its folder. With `JOB_STORAGE__CACHE` on a disk that outlives the job, the folders of
killed attempts, with checkpoints and fetched files, would fill that disk. So the next attempt at the same run removes
them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from job.common.disk import disk_errors
from job.errors import Problem, SettingsError

PREFIX = "qlora-job-"


@contextmanager
def work_folder(cache: str | None, run: str, attempt: int, *, cleans: bool) -> Iterator[Path]:
    """An empty folder, which is removed at the end.

    Args:
        cache: Where it is made; None for the system's folder for temporary files.
        run: Names the run: the URI of its store.
        attempt: The attempt's number.
        cleans: Whether to remove what earlier attempts at the run left here; one process of a machine does.

    Raises:
        SettingsError, AccessDenied, Unreachable: No folder can be made there.
    """
    parent = Path(cache or tempfile.gettempdir())
    what = f"{'JOB_STORAGE__CACHE: ' if cache else ''}cannot make the folder {parent}"
    of_run = f"{PREFIX}{sha256(run.encode()).hexdigest()[:12]}-"
    try:
        with disk_errors(what):
            parent.mkdir(parents=True, exist_ok=True)
            if cleans:
                _remove_left(parent, of_run, attempt)
            own = tempfile.TemporaryDirectory(prefix=f"{of_run}{attempt}-", dir=parent, ignore_cleanup_errors=True)
    except FileNotFoundError as error:  # though its parents were to be made: such as in /proc
        raise SettingsError([Problem(what, f"{error.strerror}; give another path")]) from error
    with own as name:
        lock = _open_lock(Path(name))
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(name)
        finally:
            os.close(lock)


@contextmanager
def folder_for(what: str, cache: str | None) -> Iterator[Path]:
    """A folder like `work_folder`, for what is no attempt's, such as a push or a verification.

    Args:
        what: Names it: what killed processes left of the same name is removed.
        cache: As for `work_folder`: copies of published files may be too large for the system's temporary files.
    """
    with work_folder(cache, what, int(time.time()), cleans=True) as folder:
        yield folder


def _remove_left(parent: Path, of_run: str, attempt: int) -> None:
    """Removes what attempts before this one left."""
    for left in parent.glob(f"{of_run}*"):
        number = re.match(r"\d+", left.name.removeprefix(of_run))
        if number is not None and int(number[0]) < attempt:
            _remove_unless_used(left)


def _remove_unless_used(folder: Path) -> None:
    """Removes a folder unless a process holds its lock, such as a replaced attempt that still runs."""
    with suppress(OSError):  # another process removes it, or the file system has no locks
        lock = _open_lock(folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _open_lock(folder: Path) -> int:
    """A file in the folder, open for writing: NFS locks no other. Its lock ends with the process."""
    return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
