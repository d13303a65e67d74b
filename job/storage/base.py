"""What an object store is: the protocol, its words, and what both stores (`s3`, `local`) have in common.

Absence is only ever a confirmed answer: `None` or `FileNotFoundError` mean that the store looked and there is nothing.
Whatever else goes wrong is an error of `errors`: `AccessDenied`, `Unreachable` or `SettingsError`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol
from uuid import uuid4

from job.errors import AccessDenied, JobError, Problem, SettingsError, Unreachable

MIB = 1 << 20
MAX_READ_BYTES = 16 * MIB
# Where a local store keeps temporary files and its lock; no key may lead there, in no store.
HIDDEN = ".store"
# Bytes of UTF-8: S3's limit for a whole key and the usual limit of file systems for one name.
_MAX_KEY, _MAX_PART = 1024, 255
PROBE = ".probe-"
# An ETag that no object has: conditional writes that name it must be refused.
_NO_TAG = '"00000000000000000000000000000000"'


@dataclass(frozen=True)
class ObjectInfo:
    """An object as a listing shows it: its key relative to the store, and its size."""

    key: str
    bytes: int


@dataclass(frozen=True)
class Stored:
    """The content of an object, and its version: an opaque tag for the next conditional write (S3's ETag)."""

    data: bytes
    tag: str


class Conflict(JobError):
    """A conditional write was refused: somebody else wrote in between. Whoever writes conditionally handles it."""


class TooLarge(JobError):
    """An object is larger than the reader allows."""


class NotSupported(SettingsError):
    """The store does not know what it was asked for, such as a conditional write."""


class ObjectStore(Protocol):
    """A handful of verbs over objects named by relative POSIX paths (see `check_key`)."""

    @property
    def uri(self) -> str:
        """Where the store lies: `s3://bucket/prefix` or an absolute path."""

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """Read a small object into memory.

        Returns:
            The object, or None if it is confirmed to be absent.

        Raises:
            TooLarge: it has more than `max_bytes`.
        """

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """Write a small object whole, replacing the old one; with a condition, only if the condition holds.

        Payloads of conditional writes must be unique to their writer (a UUID in them will do): after an answer got
        lost, that is how a writer tells its own success from another's.

        Returns:
            The new tag.

        Raises:
            Conflict: `if_absent` and the object exists, or `if_tag` and the object's tag is another, or it is absent.
        """

    def upload(self, path: Path, key: str) -> None:
        """Write an object of any size from a file; it becomes visible whole or not at all."""

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """Read an object of any size into a file; the file appears whole and durable, or not at all.

        Raises:
            FileNotFoundError: the object is confirmed to be absent.
            TooLarge: it has more than `max_bytes`.
        """

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix` (a string, not necessarily a folder), sorted by key."""

    def delete(self, key: str) -> None:
        """Remove an object; that it is absent already is fine."""

    def conditional_writes(self) -> bool:
        """Try by real round trips whether conditional writes are honoured; also proves that the store can be written.

        Raises:
            JobError: it cannot be written at all, or what was written cannot be deleted.
        """


def check_key(key: str) -> str:
    """Return `key` if it is a relative POSIX path that means the same in every store.

    Raises:
        ValueError: it is absolute, not normal, leads upwards, or has characters that some store cannot keep.
    """
    parts = key.split("/")
    if (
        any(part in {"", ".", "..", HIDDEN} or len(part.encode()) > _MAX_PART for part in parts)
        or len(key.encode()) > _MAX_KEY
        or any(character < " " or character in "\\\x7f\ufffe\uffff" for character in key)
    ):
        raise ValueError(f"not a key: {key!r}; keys are normal, relative POSIX paths without control characters")
    return key


def is_key(key: str) -> bool:
    """Whether the store's verbs take `key`: others can put names into a store that they do not."""
    try:
        check_key(key)
    except ValueError:
        return False
    return True


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or the beginning of a key.

    Raises:
        ValueError: no key can begin like this.
    """
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def probe(store: ObjectStore) -> bool:
    """Whether `store` honours both conditions of a write, found out on an object of its own that is removed again."""
    name = uuid4().hex
    key = f"{PROBE}{name}"
    try:
        tag = store.write(key, f"{name} 1".encode(), if_absent=True)
    except NotSupported:
        store.write(key, name.encode())
        store.delete(key)
        return False
    try:
        return (
            not _writes(store, key, f"{name} 2", if_absent=True)
            and not _writes(store, key, f"{name} 3", if_tag=_NO_TAG)
            and _writes(store, key, f"{name} 4", if_tag=tag)
        )
    finally:
        store.delete(key)


def _writes(store: ObjectStore, key: str, text: str, *, if_absent: bool = False, if_tag: str | None = None) -> bool:
    try:
        store.write(key, text.encode(), if_absent=if_absent, if_tag=if_tag)
    except (Conflict, NotSupported):
        return False
    return True


def byte_limit(what: str, max_bytes: int | None) -> Callable[[int], None]:
    """Return a function that takes numbers of bytes, from any thread, and raises `TooLarge` once they are too many."""
    seen, lock = 0, Lock()

    def allowed(count: int) -> None:
        nonlocal seen
        with lock:
            seen += count
        if max_bytes is not None and seen > max_bytes:
            raise TooLarge(f"{what} has more than {max_bytes} bytes")

    return allowed


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Lend a temporary name beside `path`; what was written there takes the place of `path`, durably, on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not derived from the name, which may already be as long as the file system allows.
    temporary = path.parent / f".{uuid4().hex}.part"
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn what a local disk can answer into errors of the job; `FileNotFoundError` is an answer and passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        message = f"{error.filename} is in the way: a name cannot be both an object and a folder of objects"
        raise SettingsError([Problem(what, message)]) from error
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise AccessDenied(f"{what}: {error.strerror} ({error.filename})") from error
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise Unreachable(f"{what}: the disk is full ({error.strerror}); free space or give it more") from error
        raise Unreachable(f"{what}: the disk fails: {error}") from error
