"""What an object store is: the contract verb by verb, and what all stores have in common.

A store holds objects under keys (see `check_key`). All verbs may be called from several threads.

    read(key)       the whole object and its tag, or None: the store confirmed that the object does not exist.
                    TooLarge: it has more than `max_bytes`.
    tag(key)        the object's tag alone, for any size, or None as for `read`.
    write(key)      replaces the whole object, durably; returns its new tag. With `if_absent` or `if_tag` only if that
                    condition holds at the moment of writing.
                    Conflict: the condition does not hold. NotSupported: the store has no conditional writes.
    upload(key)     like `write`, from a file of any size. Readers see either the old object or the new one.
                    A store may be without conditions for files of more than `MAX_READ_BYTES`; it writes them plainly.
                    NotSupported: the server refuses a kind of request that this needs.
    download(key)   into a file, which appears complete and durable, or not at all.
                    FileNotFoundError: the object does not exist. TooLarge: it has more than `max_bytes`.
    list(prefix)    keys and sizes, sorted by key, of all objects whose key begins with `prefix`, including every
                    object that was written before the call.
    delete(key)     removes the object; no error if there is none. With `if_tag` only if it has that version.
                    Conflict: it has another one. A store without this condition removes it anyway.
    conditional_writes()    whether the conditions of `write` are honoured, determined by a test.
    uri             where the store is, for messages: `s3://bucket/prefix` or an absolute path.

All verbs raise ValueError for an invalid key, and for every other failure one of three errors of the job:
AccessDenied (the store refuses), Unreachable (no answer after all retries, or a full disk) and SettingsError (such as a
bucket that does not exist). An error never counts as absence: otherwise a run could take it for "no checkpoint" and
start again from step 0.

How to add a store:

1. Write `job/storage/<name>.py` with a class that has the verbs above, and
   `open(location: Location, options: StorageOptions)`, a class method, which makes one without asking the server.
   Errors of the client library are translated there; take `check_size` for limits, `common.disk.atomic_write` for
   downloads, `attempts` for what the library does not repeat, `try_conditional_writes` for `conditional_writes`.
   Give the client `options.timeout_seconds`: it must not hang. Send a request `options.retries` times, with pauses
   of `pause_seconds`; what no pause helps, such as a name that does not resolve, fails at once.
2. Name it in the table `BACKENDS` of `job/storage/location.py`: scheme -> "module:class". The client library is
   imported only when a URI of that scheme is opened.
3. Run `tests/contract`: it finds the store in the table. It needs an empty location to write to, given as
   `CONTRACT_<SCHEME>=<scheme>://bucket/prefix`; a server that the tests start themselves is a line in its `PLACES`.

Settings, plan, pull, `compare` and `verify` use stores only through that table. `ForwardingStore` is the base of
wrappers around a store: the fence of a run, and injected faults.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol
from uuid import uuid4

from job.errors import JobError, SettingsError, Unreachable

MIB = 1 << 20
MAX_READ_BYTES = 16 * MIB
# Of files: up to this size one connection is fast enough, and spares the training process the threads.
ONE_CONNECTION_BYTES = 32 * MIB
CONNECTIONS = 8
# Clients repeat requests automatically, so attempts to read a body multiply with theirs.
MAX_BODY_TRIES = 5
MAX_CONNECT_SECONDS = 20.0
# Pauses (seconds) before what a client does not repeat is tried again.
PAUSES = (0.1, 0.3, 1.0, 3.0)
# Pauses (seconds) before the second try of a request and each later one, the last for all that follow; each gets up to
# `_SPREAD` of itself longer, drawn at random. With the default of eight tries they add up to at least 61 s: the restart
# of a store, or a failure of the network, often takes half a minute.
REQUEST_PAUSES = (0.3, 1.0, 3.0, 9.0, 16.0, 16.0, 16.0)
_SPREAD = 0.4
# Where a local store keeps temporary files and its lock; no key may lead there, in no store.
HIDDEN = ".store"
LOCK = "lock"
# Bytes of UTF-8: S3's limit for a whole key and the usual limit of file systems for one name.
_MAX_KEY, _MAX_PART = 1024, 255
PROBE = ".probe-"
_COPY_MARKS = (".sagemaker-uploading", ".sagemaker-uploaded")
_TRIES = 5
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
    """A conditional write was refused: another process wrote in between. The caller handles it."""


class TooLarge(JobError):
    """An object is larger than the reader allows."""


class NotSupported(SettingsError):
    """The store does not support the request, such as a conditional write."""


class ObjectStore(Protocol):
    """The verbs of a store; the top of this file says what each promises and raises."""

    @property
    def uri(self) -> str:
        """Location of the store: a URI without a slash at its end, or an absolute path."""

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """Reads a small object into memory; None if it is confirmed to be absent. Raises `TooLarge`."""

    def tag(self, key: str) -> str | None:
        """The tag of an object of any size; None if it is confirmed to be absent."""

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """Writes a small object, with at most one condition; returns its new tag. Raises `Conflict`, `NotSupported`.

        The payload of a conditional write must be unique to its writer (a UUID in it will do): if the answer gets lost,
        that is how a writer tells its own success from another's.
        """

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_tag: str | None = None) -> None:
        """Writes an object of any size from a file. Raises `Conflict`, `NotSupported`."""

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """Reads an object of any size into a file. Raises `FileNotFoundError`, `TooLarge`."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix` (a string, not necessarily a folder), sorted by key."""

    def delete(self, key: str, *, if_tag: str | None = None) -> None:
        """Removes an object, if there is one. Raises `Conflict`."""

    def conditional_writes(self) -> bool:
        """Tries whether conditional writes work; a JobError if nothing can be written or deleted."""


CHANGES = ("write", "upload", "delete")
"""The operations that change a store's objects; `conditional_writes` only touches a test object."""


class ForwardingStore:
    """Hands every verb to another store; `around` is entered before each request and left after it.

    Derived classes override `around`, so that a new verb is forwarded in one place.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.uri = store.uri

    def around(self, verb: str, key: str) -> AbstractContextManager[None]:  # noqa: ARG002 - for those who override it
        """Context manager around one request; an exception on entering it prevents the request."""
        return nullcontext()

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """See `ObjectStore.read`."""
        with self.around("read", key):
            return self._store.read(key, max_bytes=max_bytes)

    def tag(self, key: str) -> str | None:
        """See `ObjectStore.tag`."""
        with self.around("tag", key):
            return self._store.tag(key)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`."""
        with self.around("write", key):
            return self._store.write(key, data, if_absent=if_absent, if_tag=if_tag)

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_tag: str | None = None) -> None:
        """See `ObjectStore.upload`."""
        with self.around("upload", key):
            self._store.upload(path, key, if_absent=if_absent, if_tag=if_tag)

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """See `ObjectStore.download`."""
        with self.around("download", key):
            self._store.download(key, path, max_bytes=max_bytes)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        with self.around("list", prefix):
            yield from self._store.list(prefix)

    def delete(self, key: str, *, if_tag: str | None = None) -> None:
        """See `ObjectStore.delete`."""
        with self.around("delete", key):
            self._store.delete(key, if_tag=if_tag)

    def conditional_writes(self) -> bool:
        """See `ObjectStore.conditional_writes`."""
        with self.around("conditional_writes", ""):
            return self._store.conditional_writes()


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
    """Whether `key` is valid for the store's verbs; other programs may write objects whose names are not."""
    try:
        check_key(key)
    except ValueError:
        return False
    return True


def is_copy_mark(name: str, size: int) -> bool:
    """Whether a file is an empty one with which SageMaker notes, in a folder that it copies to S3, what it has copied.

    A file with content is none, whatever its name: nobody would see what it holds.
    """
    return size == 0 and name.endswith(_COPY_MARKS)


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or the beginning of a key.

    Raises:
        ValueError: no key can begin like this.
    """
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def try_conditional_writes(store: ObjectStore) -> bool:
    """Whether `store` honours both conditions of a write, tested with an object that is removed again."""
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


def read_record(store: ObjectStore, key: str) -> Stored | None:
    """Like `ObjectStore.read`; one too large for a record is returned empty, which no reader takes for a record."""
    try:
        return store.read(key)
    except TooLarge:
        tag = store.tag(key)
        return None if tag is None else Stored(b"", tag)


def write_in_turn(store: ObjectStore, key: str, data: bytes, tag: str | None) -> str:
    """Replaces an object on condition that it still has the tag that was read last; returns its new tag.

    For writers behind a fence. A process may be suspended between the fence's check and the write; meanwhile another
    attempt may take over, change the object, and publish a hash of it. Then the condition fails, and the next try
    checks the fence again.

    Args:
        store: The store, usually behind a fence.
        key: Key of the object.
        data: Its new content, unique to the writer.
        tag: Tag of the object when it was last read; None if there was no object.

    Raises:
        Unreachable: The object is changed again and again. Other errors of the store, such as `Replaced`, pass.
    """
    for _ in range(_TRIES):
        try:
            return store.write(key, data, if_absent=tag is None, if_tag=tag)
        except Conflict:
            tag = store.tag(key)
    raise _changed_again_and_again(store, key)


def upload_in_turn(store: ObjectStore, path: Path, key: str) -> None:
    """Uploads a file on condition that the object's tag has not changed since it was read; see `write_in_turn`.

    Attempts may publish different bytes, such as measured times, and one that was suspended must not replace its
    successor's file.

    Raises:
        Unreachable: The object is changed again and again. Other errors of the store, such as `Replaced`, pass.
    """
    for _ in range(_TRIES):
        tag = store.tag(key)
        with suppress(Conflict):
            store.upload(path, key, if_absent=tag is None, if_tag=tag)
            return
    raise _changed_again_and_again(store, key)


def delete_in_turn(store: ObjectStore, key: str) -> None:
    """Removes an object on condition that its tag has not changed since it was read; see `write_in_turn`.

    Raises:
        Unreachable: The object is changed again and again. Other errors of the store, such as `Replaced`, pass.
    """
    for _ in range(_TRIES):
        if (tag := store.tag(key)) is None:
            return
        with suppress(Conflict):
            store.delete(key, if_tag=tag)
            return
    raise _changed_again_and_again(store, key)


def _changed_again_and_again(store: ObjectStore, key: str) -> Unreachable:
    what = f"{store.uri}/{key} was changed by another process {_TRIES} times in a row"
    return Unreachable(f"{what}; start the run again")


def attempts(*, repeats: int | None = None) -> Iterator[None]:
    """Yields for each attempt at what a client does not repeat; before each repetition it waits one of `PAUSES`.

    `repeats` is how many attempts there are after the first; None for as many as there are pauses.
    """
    yield
    for pause in PAUSES[:repeats]:
        time.sleep(pause)
        yield


def pause_seconds(tries: int) -> float:
    """Seconds to wait before a request is repeated, by the number of its failures (at least 1)."""
    pauses = REQUEST_PAUSES
    # Drawn at random, so that the machines of a run do not all ask a store again at the same moment.
    return pauses[min(tries, len(pauses)) - 1] * random.uniform(1, 1 + _SPREAD)  # noqa: S311


def conflict(place: str) -> Conflict:
    """What a conditional change of the object at `place` raises when its condition does not hold."""
    return Conflict(f"{place} was written by another process")


def check_size(name: str, size: int, max_bytes: int | None) -> None:
    """Raises `TooLarge` if `size` bytes are more than `max_bytes`, which is None without a limit."""
    if max_bytes is not None and size > max_bytes:
        raise TooLarge(f"{name} has more than {max_bytes} bytes")


def byte_limit(name: str, max_bytes: int | None) -> Callable[[int], None]:
    """Return a function that takes numbers of bytes, from any thread, and raises `TooLarge` once they are too many."""
    total, lock = 0, Lock()

    def count_bytes(count: int) -> None:
        nonlocal total
        with lock:
            total += count
        check_size(name, total, max_bytes)

    return count_bytes
