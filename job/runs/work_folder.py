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
_LOCK = ".lock"


@contextmanager
def work_folder(cache: str | None, run: str, attempt: int, *, cleans: bool) -> Iterator[Path]:
    """An empty folder, which is removed at the end.

    Args:
        cache: Where it is made; None for the system's folder for temporary files.
        run: Names the run: the URI of its store.
        attempt: The attempt's number.
        cleans: Whether to remove what earlier attempts at the run left here; one process of a machine does.
    """
    parent = Path(cache or tempfile.gettempdir())
    setting = "JOB_STORAGE__CACHE" if cache else "TMPDIR"
    with _folder_errors(setting, f"cannot make the folder {parent}"):
        parent.mkdir(parents=True, exist_ok=True)
    of_run = f"{PREFIX}{sha256(run.encode()).hexdigest()[:12]}-"
    if cleans:
        for left in parent.glob(f"{of_run}*"):
            number = re.match(r"\d+", left.name.removeprefix(of_run))
            if number is not None and int(number[0]) < attempt:
                _remove_unless_used(left)
    with _folder_errors(setting, f"cannot make a folder in {parent}"):
        folder, lock = _make_locked(f"{of_run}{attempt}-", parent)
    with folder as name:
        try:
            yield Path(name)
        finally:
            os.close(lock)


def _make_locked(prefix: str, parent: Path) -> tuple[tempfile.TemporaryDirectory[str], int]:
    """A new folder and its lock, which is held.

    Until it is held, another process may take the folder for one that was left, and remove it: then a new one is made.
    """
    while True:
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
        with suppress(FileNotFoundError):
            lock = _open_lock(Path(folder.name))
            if _take(lock, Path(folder.name)):
                return folder, lock
            os.close(lock)
        folder.cleanup()


def _take(lock: int, folder: Path) -> bool:
    """Takes the lock of a new folder; False if another process removes the folder, or has removed it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), (folder / _LOCK).stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks: no process removes the folder
        return True


@contextmanager
def _folder_errors(setting: str, what: str) -> Iterator[None]:
    """Errors of making a folder as errors of the job that name the setting."""
    with disk_errors(f"{setting}: {what}"):
        try:
            yield
        except FileNotFoundError:  # though its parents were made: such as in /proc
            problem = Problem(setting, f"{what}: its file system allows no new folders; give another path")
            raise SettingsError([problem]) from None


@contextmanager
def folder_for(what: str, cache: str | None) -> Iterator[Path]:
    """A folder like `work_folder`, for what is no attempt's, such as a push or a verification.

    Args:
        what: Names it: what killed processes left of the same name is removed.
        cache: As for `work_folder`: copies of published files may be too large for the system's temporary files.
    """
    with work_folder(cache, what, int(time.time()), cleans=True) as folder:
        yield folder


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
    return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
