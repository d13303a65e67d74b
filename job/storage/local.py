"""An object store in a local folder, with S3's semantics: whole objects, conditional writes, no empty folders.

Objects are staged in a hidden folder of the same file system, flushed, and renamed into place under a lock. Symbolic
links below the root are refused, so that no key leads out of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING
from uuid import uuid4

from job.common.disk import atomic_write, disk_errors, lacking, rename, sync, sync_folder
from job.errors import AccessDenied, Problem, SettingsError, Unreachable
from job.storage.base import (
    HIDDEN,
    LOCK,
    MAX_READ_BYTES,
    Conflict,
    ObjectInfo,
    Stored,
    check_key,
    check_prefix,
    check_size,
    is_copy_mark,
    try_conditional_writes,
)

if TYPE_CHECKING:
    from typing import Self

    from job.storage.location import Location, StorageOptions

_POLL_SECONDS = 0.005
# A lock is held for a few renames and flushes. A holder that is only slow, and loses it, tries again.
_STUCK_SECONDS = 10.0
_MAX_LOCK_LOSSES = 5
_MAX_NAME = 255
# SageMaker, which copies a folder to S3 while the job runs, leaves files with this ending alone.
_TEMPORARY = ".part.sagemaker-ignore"
# Staged files of killed processes are removed after a day; no upload takes that long.
_STALE_SECONDS = 24 * 3600
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class _LockLost(Exception):
    """Another process took over the lock while this one was suspended; nothing was renamed into place."""


class LocalStore:
    """An `ObjectStore` in the folder `root`, which is created by the first write. A tag is the content's SHA-256."""

    def __init__(self, root: Path, *, timeout_seconds: float = 60.0) -> None:
        self._root = Path(os.path.realpath(root.expanduser()))
        self._timeout = timeout_seconds
        self.uri = str(self._root)

    @classmethod
    def open(cls, location: Location, options: StorageOptions) -> Self:
        """The store in the folder that a path names."""
        return cls(Path(location.key), timeout_seconds=options.timeout_seconds)

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """See `ObjectStore.read`."""
        with disk_errors(f"{self.uri}: cannot read {key}"):
            file = self._open(key)
            if file is None:
                return None
            with file:
                data = file.read(max_bytes + 1)
        check_size(f"{self.uri}/{key}", len(data), max_bytes)
        return Stored(data, _tag(data))

    def tag(self, key: str) -> str | None:
        """See `ObjectStore.tag`."""
        with disk_errors(f"{self.uri}: cannot read {key}"):
            file = self._open(key)
            if file is None:
                return None
            with file:
                return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`."""

        def stage(staged: Path) -> None:
            staged.write_bytes(data)

        with disk_errors(f"{self.uri}: cannot write {key}"):
            self._put(key, stage, if_absent=if_absent, if_tag=if_tag)
        return _tag(data)

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_tag: str | None = None) -> None:
        """See `ObjectStore.upload`."""

        def stage(staged: Path) -> None:
            shutil.copyfile(path, staged)

        with disk_errors(f"{self.uri}: cannot write {key}"):
            self._put(key, stage, if_absent=if_absent, if_tag=if_tag)

    def _put(
        self, key: str, stage: Callable[[Path], None], *, if_absent: bool = False, if_tag: str | None = None
    ) -> None:
        """Stages an object and gives it its name under the lock; again if the lock was lost in between."""
        for _ in range(_MAX_LOCK_LOSSES):
            with self._staging(key) as (staged, target), suppress(_LockLost):
                stage(staged)
                sync(staged)
                with self._locked(staged.name):
                    if if_tag is not None and self.tag(key) != if_tag:
                        raise Conflict(f"{self.uri}: {key} was changed by another process")
                    self._rename_into_place(staged, target, only_if_absent=if_absent)
                return
        raise Unreachable(
            f"{self.uri}: cannot write {key}; the store's lock was lost {_MAX_LOCK_LOSSES} times in a row"
        )

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """See `ObjectStore.download`."""
        with disk_errors(f"{self.uri}: cannot read {key} into {path}"):
            file = self._open(key)
            if file is None:
                raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.uri}/{key}")
            with file, atomic_write(path) as temporary, temporary.open("wb") as copy:
                check_size(f"{self.uri}/{key}", os.fstat(file.fileno()).st_size, max_bytes)
                shutil.copyfileobj(file, copy)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`. Symbolic links, special files and SageMaker's marks are no objects."""
        folder = check_prefix(prefix).rpartition("/")[0]
        with disk_errors(f"{self.uri}: cannot list {prefix}"):
            infos = [info for info in self._walk(self._path(folder)) if info.key.startswith(prefix)]
        yield from sorted(infos, key=lambda info: info.key)

    def delete(self, key: str, *, if_tag: str | None = None) -> None:
        """See `ObjectStore.delete`. Folders that become empty go too.

        The object is moved into a folder that is staged as an upload is: a process that stood still, and whose lock was
        taken, no longer has that folder and so removes nothing that was put there meanwhile.
        """
        with disk_errors(f"{self.uri}: cannot delete {key}"):
            path = self._path(check_key(key))
            for _ in range(_MAX_LOCK_LOSSES):
                if not _is_file(path):
                    return
                with self._staging(key) as (staged, _), suppress(_LockLost):
                    staged.mkdir()
                    with self._locked(staged.name):
                        if if_tag is not None and self.tag(key) not in {None, if_tag}:
                            raise Conflict(f"{self.uri}: {key} was changed by another process")
                        self._remove(path, staged)
                    return
        raise Unreachable(
            f"{self.uri}: cannot delete {key}; the store's lock was lost {_MAX_LOCK_LOSSES} times in a row"
        )

    def _remove(self, path: Path, staged: Path) -> None:
        """Moves an object into a staged folder, and removes the folders that are empty without it.

        Raises:
            _LockLost: Whoever waited for the lock has removed the staged folder.
        """
        try:
            rename(path, staged / f"deleted{_TEMPORARY}")
        except FileNotFoundError:
            if not staged.exists():
                raise _LockLost from None
        for folder in self._folders(path):
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue  # another process has removed it
            except OSError:
                with suppress(FileNotFoundError):  # another process may remove it now
                    sync_folder(folder)
                break

    def conditional_writes(self) -> bool:
        """See `ObjectStore.conditional_writes`."""
        return try_conditional_writes(self)

    def _path(self, key: str) -> Path:
        path = self._root / key
        if Path(os.path.realpath(path)) != path or path.is_symlink():  # a link to itself resolves to itself
            raise AccessDenied(f"{self.uri}: {key} is below a symbolic link; use the folder that it points to")
        return path

    def _open(self, key: str) -> BufferedReader | None:
        """Open an object for reading; None where there certainly is none."""
        path = self._path(check_key(key))
        try:
            return path.open("rb") if _is_file(path) else None
        except FileNotFoundError:
            return None

    def _folders(self, path: Path) -> tuple[Path, ...]:
        """Return the folders of `path` below the root, innermost first, and the root itself."""
        return tuple(folder for folder in path.parents if folder.is_relative_to(self._root))

    def _rename_into_place(self, staged: Path, target: Path, *, only_if_absent: bool = False) -> None:
        """Gives a staged file its name.

        Raises:
            Conflict: The name is taken, and it was not to be.
            _LockLost: Whoever waited for the lock has removed the staged file, or the empty folder that was just made.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if only_if_absent:
                _link(staged, target)
            else:
                rename(staged, target)
        except FileNotFoundError:
            if staged.exists() and target.parent.exists():
                raise
            raise _LockLost from None
        for folder in self._folders(target):
            with suppress(FileNotFoundError):  # another process may have deleted the object since
                sync_folder(folder)

    def _walk(self, folder: Path) -> Iterator[ObjectInfo]:
        try:
            entries = tuple(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(status.st_mode) and entry.name != HIDDEN:
                yield from self._walk(Path(entry.path))
            elif stat.S_ISREG(status.st_mode) and not is_copy_mark(entry.name, status.st_size):
                yield ObjectInfo(Path(entry.path).relative_to(self._root).as_posix(), status.st_size)

    @contextmanager
    def _staging(self, key: str) -> Iterator[tuple[Path, Path]]:
        """Yields a temporary path on the root's file system, and the object's path; removes the temporary file."""
        target = self._path(check_key(key))
        hidden = self._root / HIDDEN
        try:
            hidden.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # though its parents were to be made: such as in /proc
            what = "cannot be used: its file system allows no new folders; give another path"
            raise SettingsError([Problem(str(self._root), what)]) from None
        for old in hidden.glob(f"*{_TEMPORARY}"):
            with suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                    _discard(old)
        path = hidden / f"{uuid4().hex}{_TEMPORARY}"
        try:
            yield path, target
        finally:
            _discard(path)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Holds the store's lock, which takes a few renames, so waiting for it is bounded.

        A process that is stopped while it holds the lock would keep everyone out. So the lock says who holds it, and
        who has waited `_STUCK_SECONDS` for one holder creates the next lock. Its first holder removes what the
        stopped one had staged: when that one continues, it has nothing to put in place, and begins again.

        Args:
            name: Unique to this use of the lock; that of the staged file, if there is one.

        Raises:
            Unreachable: The lock is not to be had in time.
            SettingsError: The file system has no locks.
        """
        hidden = self._root / HIDDEN
        hidden.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self._timeout
        holder, since = None, time.monotonic()
        while True:
            path = _newest_lock(hidden)
            with path.open("a+b") as lock:
                if _try_lock(lock):
                    # The name first, then the look for a newer lock: its creator sees this name, or is seen.
                    lock.truncate(0)
                    lock.write(name.encode())
                    lock.flush()
                    if _newest_lock(hidden) == path:
                        _take_over_locks(hidden, path)
                        yield  # closing the file releases the lock
                        return
                    continue
                lock.seek(0)
                seen = (path, lock.read(_MAX_NAME))
            now = time.monotonic()
            if seen != holder:
                holder, since = seen, now
            elif now - since > _STUCK_SECONDS:
                (hidden / f"{LOCK}-{_lock_number(path) + 1}").touch()
            if now > deadline:
                raise Unreachable(f"{path} was locked by another process for {self._timeout:g} s")
            time.sleep(_POLL_SECONDS)


def _try_lock(file: IO[bytes]) -> bool:
    """Whether the lock was free, and is held now."""
    try:
        with lacking("locks (flock)"):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_number(path: Path) -> int:
    number = path.name.removeprefix(LOCK).removeprefix("-")
    return int(number) if number.isdecimal() else 0


def _newest_lock(hidden: Path) -> Path:
    return max(hidden.glob(f"{LOCK}*"), key=_lock_number, default=hidden / LOCK)


def _take_over_locks(hidden: Path, own_lock: Path) -> None:
    """Removes the older locks, and the files that their holders had staged."""
    for path in hidden.glob(f"{LOCK}*"):
        if _lock_number(path) < _lock_number(own_lock):
            with suppress(FileNotFoundError):
                staged = Path(path.read_text(encoding="utf-8", errors="replace")).name
                if staged.endswith(_TEMPORARY):
                    _discard(hidden / staged)
                path.unlink()


def _discard(staged: Path) -> None:
    """Removes what was staged: a file, or the folder of an object that is deleted."""
    if staged.is_dir():
        shutil.rmtree(staged, ignore_errors=True)
    else:
        staged.unlink(missing_ok=True)


def _link(staged: Path, target: Path) -> None:
    """Gives a staged file a name that is not in use.

    Raises:
        Conflict: One has it.
    """
    try:
        # The only atomic "create with content"; it works even where locks are not shared between hosts.
        os.link(staged, target)
    except FileExistsError:
        raise Conflict(f"{target} exists") from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if target.exists():
            raise Conflict(f"{target} exists") from None
        rename(staged, target)


def _is_file(path: Path) -> bool:
    """Whether `path` is a regular file; unlike `Path.is_file`, raises if permissions forbid to find out."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
