"""A store that only the holder of the run's lease can change, so that no stage has to remember to ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from job.errors import JobError
from job.runs.lease import Lease
from job.storage.open import ObjectInfo, ObjectStore, Stored
from job.storage.base import MAX_READ_BYTES


def fenced(store: ObjectStore, lease: Lease | None) -> ObjectStore:
    """`store`, but nothing in it changes unless `lease` is still held: else `Replaced` is raised.

    Without a lease nothing changes at all: of several processes one holds it, and a change by another one is a bug.

    A small object, which may be a marker, a record or the manifest, is preceded by a proof (`Lease.confirm`); a file or
    a removal by a look (`Lease.check`), because what makes files count is a small object that follows them.
    """
    return _Guarded(store, lease or _NoLease())


class _NoLease:
    """What the processes have that hold no lease."""

    def confirm(self) -> None:
        """Refuses."""
        raise JobError("a bug: only process 0 may change the run's store")

    check = confirm


class _Guarded:
    """See `guarded`."""

    def __init__(self, store: ObjectStore, lease: Lease | _NoLease) -> None:
        self._store, self._lease = store, lease
        self.uri = store.uri

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """See `ObjectStore.read`."""
        return self._store.read(key, max_bytes=max_bytes)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`."""
        self._lease.confirm()
        return self._store.write(key, data, if_absent=if_absent, if_tag=if_tag)

    def upload(self, path: Path, key: str) -> None:
        """See `ObjectStore.upload`."""
        self._lease.check()
        self._store.upload(path, key)

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """See `ObjectStore.download`."""
        self._store.download(key, path, max_bytes=max_bytes)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self._lease.check()
        self._store.delete(key)

    def conditional_writes(self) -> bool:
        """See `ObjectStore.conditional_writes`."""
        return self._store.conditional_writes()
