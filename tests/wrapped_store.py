"""A store around a real one that tells a test of every request, before and after, and lets it fail any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from job.storage.base import MAX_READ_BYTES
from job.storage.open import ObjectInfo, ObjectStore, Stored

CHANGES = ("write", "upload", "delete")


class WrappedStore:
    """Calls `before(verb, key)` ahead of each request and `after(verb, key)` behind it; either may raise."""

    def __init__(
        self,
        store: ObjectStore,
        before: Callable[[str, str], None] = lambda _verb, _key: None,
        after: Callable[[str, str], None] = lambda _verb, _key: None,
    ) -> None:
        self._store, self.before, self.after = store, before, after
        self.uri = store.uri

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """See `ObjectStore.read`."""
        self.before("read", key)
        stored = self._store.read(key, max_bytes=max_bytes)
        self.after("read", key)
        return stored

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`."""
        self.before("write", key)
        tag = self._store.write(key, data, if_absent=if_absent, if_tag=if_tag)
        self.after("write", key)
        return tag

    def upload(self, path: Path, key: str) -> None:
        """See `ObjectStore.upload`."""
        self.before("upload", key)
        self._store.upload(path, key)
        self.after("upload", key)

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """See `ObjectStore.download`."""
        self.before("download", key)
        self._store.download(key, path, max_bytes=max_bytes)
        self.after("download", key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        self.before("list", prefix)
        yield from self._store.list(prefix)
        self.after("list", prefix)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self.before("delete", key)
        self._store.delete(key)
        self.after("delete", key)

    def conditional_writes(self) -> bool:
        """See `ObjectStore.conditional_writes`."""
        self.before("conditional_writes", "")
        return self._store.conditional_writes()


class FailNth:
    """Raises `error` at the `n`th (from 0) request whose verb is one of `verbs`; counts all of them."""

    def __init__(self, n: int, error: BaseException, verbs: tuple[str, ...] = CHANGES) -> None:
        self.n, self.error, self.verbs, self.seen = n, error, verbs, 0

    def __call__(self, verb: str, key: str) -> None:
        """Counts a request."""
        if verb in self.verbs:
            self.seen += 1
            if self.seen == self.n + 1:
                raise self.error
