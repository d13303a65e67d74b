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
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from job.errors import AccessDenied, Unreachable
from job.storage.base import (
    HIDDEN,
    MAX_READ_BYTES,
    Conflict,
    ObjectInfo,
    Stored,
    atomic_write,
    byte_limit,
    check_key,
    check_prefix,
    disk_errors,
    probe,
    sync,
)

if TYPE_CHECKING:
    from typing import Self

    from job.storage.location import Location, StorageOptions

_POLL_SECONDS = 0.005
# SageMaker, which copies a folder to S3 beside the job, leaves files with this ending alone.
_TEMPORARY = ".part.sagemaker-ignore"
# What a killed process left behind is removed after a day; nobody stages one object for so long.
_STALE_SECONDS = 24 * 3600
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


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
            content = self._open(key)
            if content is None:
                return None
            with content:
                data = content.read(max_bytes + 1)
        byte_limit(f"{self.uri}/{key}", max_bytes)(len(data))
        return Stored(data, _tag(data))

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`."""
        with disk_errors(f"{self.uri}: cannot write {key}"), self._staging(key) as (staged, target):
            staged.write_bytes(data)
            sync(staged)
            with self._locked():
                if if_tag is not None and self._current_tag(key) != if_tag:
                    raise Conflict(f"{self.uri}: {key} was changed by somebody else")
                self._place(staged, target, only_if_absent=if_absent)
        return _tag(data)

    def upload(self, path: Path, key: str) -> None:
        """See `ObjectStore.upload`."""
        with disk_errors(f"{self.uri}: cannot write {key}"), self._staging(key) as (staged, target):
            shutil.copyfile(path, staged)
            sync(staged)
            with self._locked():
                self._place(staged, target)

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """See `ObjectStore.download`."""
        with disk_errors(f"{self.uri}: cannot read {key} into {path}"):
            content = self._open(key)
            if content is None:
                raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.uri}/{key}")
            with content, atomic_write(path) as temporary, temporary.open("wb") as copy:
                byte_limit(f"{self.uri}/{key}", max_bytes)(os.fstat(content.fileno()).st_size)
                shutil.copyfileobj(content, copy)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`. Symbolic links and special files are no objects."""
        folder = check_prefix(prefix).rpartition("/")[0]
        with disk_errors(f"{self.uri}: cannot list {prefix}"):
            found = [info for info in self._walk(self._path(folder)) if info.key.startswith(prefix)]
        yield from sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`. Folders that become empty go too."""
        with disk_errors(f"{self.uri}: cannot delete {key}"):
            path = self._path(check_key(key))
            if not _is_file(path):
                return
            with self._locked():
                path.unlink(missing_ok=True)
                for folder in self._folders(path):
                    try:
                        folder.rmdir()
                    except OSError:
                        sync(folder)
                        break

    def conditional_writes(self) -> bool:
        """See `ObjectStore.conditional_writes`."""
        return probe(self)

    def _path(self, key: str) -> Path:
        path = self._root / key
        if Path(os.path.realpath(path)) != path or path.is_symlink():  # a link to itself resolves to itself
            raise AccessDenied(f"{self.uri}: {key} leads through a symbolic link; use the place it points to as root")
        return path

    def _open(self, key: str) -> BufferedReader | None:
        """Open an object for reading; None where there certainly is none."""
        path = self._path(check_key(key))
        try:
            return path.open("rb") if _is_file(path) else None
        except FileNotFoundError:
            return None

    def _current_tag(self, key: str) -> str | None:
        content = self._open(key)
        if content is None:
            return None
        with content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    def _folders(self, path: Path) -> tuple[Path, ...]:
        """Return the folders of `path` below the root, innermost first, and the root itself."""
        return tuple(folder for folder in path.parents if folder.is_relative_to(self._root))

    def _place(self, staged: Path, target: Path, *, only_if_absent: bool = False) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if only_if_absent:
            try:
                # The one atomic "create with content" there is; it holds even where locks do not reach other hosts.
                os.link(staged, target)
            except FileExistsError:
                raise Conflict(f"{target} exists") from None
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                if target.exists():
                    raise Conflict(f"{target} exists") from None
                staged.replace(target)
        else:
            staged.replace(target)
        for folder in self._folders(target):
            sync(folder)

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
            elif stat.S_ISREG(status.st_mode):
                yield ObjectInfo(Path(entry.path).relative_to(self._root).as_posix(), status.st_size)

    @contextmanager
    def _staging(self, key: str) -> Iterator[tuple[Path, Path]]:
        """Lend a hidden name on the root's file system, along with the object's place; remove what is left of it."""
        target = self._path(check_key(key))
        hidden = self._root / HIDDEN
        hidden.mkdir(parents=True, exist_ok=True)
        for old in hidden.glob(f"*{_TEMPORARY}"):
            try:
                if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                    old.unlink()
            except FileNotFoundError:
                continue
        path = hidden / f"{uuid4().hex}{_TEMPORARY}"
        try:
            yield path, target
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's lock; it is never held for longer than a few renames, so waiting for it is bounded."""
        hidden = self._root / HIDDEN
        hidden.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self._timeout
        with (hidden / "lock").open("ab") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        message = f"{lock.name} was held by another process for {self._timeout:g} s"
                        raise Unreachable(message) from None
                    time.sleep(_POLL_SECONDS)
            yield  # closing the file releases the lock


def _is_file(path: Path) -> bool:
    """Whether `path` is a regular file; unlike `Path.is_file`, never says no because it may not look."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
