"""A store added by the steps in `job/storage/base.py`: one class, and one line in the table, which the test adds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Self

from job.common.disk import atomic_write
from job.storage.base import (
    MAX_READ_BYTES,
    Conflict,
    ObjectInfo,
    Stored,
    check_key,
    check_prefix,
    check_size,
    try_conditional_writes,
)
from job.storage.location import Location, StorageOptions

_BUCKETS: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
_LOCK = Lock()


class MemoryStore:
    """An `ObjectStore` in the memory of this process; a tag is the content's SHA-256."""

    def __init__(self, uri: str, objects: dict[str, bytes], prefix: str) -> None:
        self.uri, self._objects, self._root = uri, objects, f"{prefix}/" if prefix else ""

    @classmethod
    def open(cls, location: Location, options: StorageOptions) -> Self:
        """The store below a prefix of a bucket."""
        del options
        return cls(str(location), _BUCKETS[location.bucket], location.key)

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """See `ObjectStore.read`."""
        data = self._objects.get(self._root + check_key(key))
        if data is None:
            return None
        check_size(key, len(data), max_bytes)
        return Stored(data, sha256(data).hexdigest())

    def tag(self, key: str) -> str | None:
        """See `ObjectStore.tag`."""
        data = self._objects.get(self._root + check_key(key))
        return None if data is None else sha256(data).hexdigest()

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`."""
        with _LOCK:
            known = self._objects.get(self._root + check_key(key))
            if if_absent and known is not None:
                raise Conflict(f"{key} exists")
            if if_tag is not None and (known is None or sha256(known).hexdigest() != if_tag):
                raise Conflict(f"{key} was changed by another process")
            self._objects[self._root + key] = data
        return sha256(data).hexdigest()

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_tag: str | None = None) -> None:
        """See `ObjectStore.upload`."""
        self.write(key, path.read_bytes(), if_absent=if_absent, if_tag=if_tag)

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """See `ObjectStore.download`."""
        data = self._objects.get(self._root + check_key(key))
        if data is None:
            raise FileNotFoundError(key)
        with atomic_write(path) as temporary:
            check_size(key, len(data), max_bytes)
            temporary.write_bytes(data)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        start = self._root + check_prefix(prefix)
        found = sorted((key, len(data)) for key, data in list(self._objects.items()) if key.startswith(start))
        yield from (ObjectInfo(key.removeprefix(self._root), count) for key, count in found)

    def delete(self, key: str, *, if_tag: str | None = None) -> None:
        """See `ObjectStore.delete`."""
        with _LOCK:
            known = self._objects.get(self._root + check_key(key))
            if known is not None and if_tag not in {None, sha256(known).hexdigest()}:
                raise Conflict(f"{key} was changed by another process")
            self._objects.pop(self._root + key, None)

    def conditional_writes(self) -> bool:
        """See `ObjectStore.conditional_writes`."""
        return try_conditional_writes(self)
