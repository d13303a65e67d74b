"""A store around a real one that calls a test before and after every request, and lets it fail any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from job.storage.base import CHANGES, ForwardingStore, ObjectStore


class WrappedStore(ForwardingStore):
    """Calls `before(verb, key)` ahead of each request and `after(verb, key)` behind it; either may raise."""

    def __init__(
        self,
        store: ObjectStore,
        before: Callable[[str, str], None] = lambda _verb, _key: None,
        after: Callable[[str, str], None] = lambda _verb, _key: None,
    ) -> None:
        super().__init__(store)
        self.before, self.after = before, after

    @contextmanager
    def around(self, verb: str, key: str) -> Iterator[None]:
        """The context of one request; `after` is called for successful ones."""
        self.before(verb, key)
        yield
        self.after(verb, key)


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
