"""What the stores of Google and Azure have in common: an `ObjectStore` by obstore, a client for both.

obstore sends the requests, and gets and renews credentials. This file adds what the contract in `base.py` requires
beyond that: pauses that outlast an outage (obstore's own may be short in sum), confirmed absence, size limits,
checksums, and durable downloads. Every object carries its SHA-256 as metadata, and what is read is compared with it,
since obstore looks at no checksum of the stores. What does not fit is read again; bytes that arrive twice are what the
store holds, and are returned, so that the caller's own hashes find the damage. Objects of other programs have no such
metadata, and only their length is checked.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import obstore
from obstore.exceptions import PreconditionError

from job.common.disk import atomic_write, disk_errors
from job.common.hashing import hash_file
from job.errors import Problem, SettingsError, Unreachable
from job.storage import base
from job.storage.base import (
    CONNECTIONS,
    MAX_BODY_TRIES,
    MAX_CONNECT_SECONDS,
    MAX_READ_BYTES,
    MIB,
    ONE_CONNECTION_BYTES,
    Conflict,
    ObjectInfo,
    Stored,
    TooLarge,
    attempts,
    check_key,
    check_prefix,
    check_size,
    conflict,
    try_conditional_writes,
)
from job.storage.location import Location, StorageOptions
from job.storage.obstore_errors import (
    ABSENT,
    FAILURES,
    Missing,
    code,
    is_client_error,
    is_failed_condition,
    translate,
    translate_setup,
)
from job.storage.obstore_listing import entries
from job.storage.obstore_requests import OtherContent, ask, ask_once, pause_or_raise, read_body

# Name of the metadata entry with an object's SHA-256.
_SHA256 = "qlorajobsha256"
# Files are read in pieces of this size, each a request, within `_PIECE_TIMEOUTS` time limits.
_PIECE_BYTES = 4 * MIB
_PIECE_TIMEOUTS = 4
_PART_BYTES, _MAX_PARTS = 8 * MIB, 9_000
# A condition holds for a single request, and obstore has the whole body of one in memory.
_MAX_CONDITIONAL_BYTES = 256 * MIB
# Only a second answer tells a damaged object from a damaged answer.
_CONFIRMING_TRIES = 2
# How often obstore repeats a part of a large upload or a page of Azure's listing, before all of it is repeated.
_INNER_REPEATS = 3
# Azure's codes for an access tier that does not exist, or that the account or the kind of blob does not have.
_REFUSED_CLASS = ("InvalidHeaderValue", "InvalidBlobTier", "BlobAccessTierNotSupportedForAccountType")
# How often a file may change while it is uploaded.
_MAX_CHANGES = 4


class ObstoreStore:
    """An `ObjectStore` through obstore. Derived classes make the client, and know what a version is and delete one."""

    scheme: str
    # Whether the server's listings are sorted by key.
    sorted_by_key: bool

    def __init__(self, location: Location, options: StorageOptions) -> None:
        self._options = options
        self._bucket = location.bucket
        self._root = f"{location.key}/" if location.key else ""
        self._body_tries = max(_CONFIRMING_TRIES, min(options.retries, MAX_BODY_TRIES))
        self.uri = str(location)
        self._client = self._connect()

    @classmethod
    def open(cls, location: Location, options: StorageOptions) -> Self:
        """The store below a prefix; sends nothing.

        Raises:
            SettingsError: The cloud's own variables are not valid.
            AccessDenied: Credentials cannot be read.
        """
        return cls(location, options)

    def _tag(self, meta: Any) -> str | None:
        """The version that obstore's description of an object names."""
        raise NotImplementedError

    def _version_condition(self, tag: str) -> dict[str, str]:
        """The condition, as obstore has it, that an object still has this version."""
        raise NotImplementedError

    def _delete_version(self, key: str, tag: str) -> None:
        """Deletes an object if it has this version.

        Raises:
            Conflict: It may have another one, or be gone.
        """
        raise NotImplementedError

    def _make_client(self, **options: Any) -> Any:
        """A client for this cloud, with these options of obstore."""
        raise NotImplementedError

    def _connect(self, *, timeout_factor: float = 1.0, headers: dict[str, str] | None = None, repeats: int = 0) -> Any:
        """A client; sends nothing yet.

        Args:
            timeout_factor: How many times the time limit of the settings a request may take.
            headers: To be sent with every request.
            repeats: How often obstore itself sends a request again at most.
        """
        seconds, repeats = self._options.timeout_seconds, min(repeats, self._options.retries - 1)
        try:
            return self._make_client(
                client_options={
                    # For a server of one's own: by default all addresses are https://
                    "allow_http": True,
                    "connect_timeout": timedelta(seconds=min(seconds, MAX_CONNECT_SECONDS)),
                    # Until the answer begins, and between two of its pieces.
                    "read_timeout": timedelta(seconds=seconds * timeout_factor),
                    # Against an answer that trickles.
                    "timeout": timedelta(seconds=seconds * timeout_factor * _PIECE_TIMEOUTS),
                    **({"default_headers": headers} if headers else {}),
                },
                retry_config={
                    "max_retries": repeats,
                    "retry_timeout": timedelta(seconds=seconds * timeout_factor * _PIECE_TIMEOUTS * (1 + repeats)),
                    # A pause is drawn between the first one and `base` times the one before.
                    "backoff": {
                        "init_backoff": timedelta(seconds=base.REQUEST_PAUSES[0]),
                        "max_backoff": timedelta(seconds=15),
                        "base": 3,
                    },
                },
            )
        except FAILURES as error:
            raise translate_setup(error, self.uri) from None  # obstore's text may have a key in it

    @cached_property
    def _repeating_client(self) -> Any:
        """For operations of many requests that obstore repeats itself: otherwise one failure would repeat all."""
        return self._connect(repeats=_INNER_REPEATS)

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """See `ObjectStore.read`."""
        check_key(key)
        earlier_digests: set[str] = set()
        with self._store_errors("read", key):
            for attempt in self._attempts():
                with self._retrying_damaged(attempt):
                    return self._read(key, max_bytes, earlier_digests)
        raise Unreachable(f"{self.uri}/{key}: cannot read: the content is cut off, or different at each try")

    def _read(self, key: str, max_bytes: int, earlier_digests: set[str]) -> Stored | None:
        """The object; `earlier_digests` are the SHA-256 of answers before that did not fit their metadata.

        Raises:
            OtherContent: The answer is damaged; its SHA-256 was added to `earlier_digests`.
        """
        answer = self._get(key)
        if answer is None:
            return None
        check_size(f"{self.uri}/{key}", answer.meta["size"], max_bytes)
        data, tag = read_body(answer), self._tag(answer.meta)
        if tag is None or len(data) != answer.meta["size"]:
            raise OtherContent
        _check_digest(hashlib.sha256(data).hexdigest(), {answer.attributes.get(_SHA256)}, earlier_digests)
        return Stored(data, tag)

    def _attempts(self) -> Iterator[int]:
        """Numbers of the tries to read a body; `_ask` repeats requests within each, so after two tries time counts."""
        end = time.monotonic() + self._options.timeout_seconds * self._options.retries
        for attempt in range(1, self._body_tries + 1):
            if attempt > _CONFIRMING_TRIES and time.monotonic() > end:
                return
            yield attempt

    @contextmanager
    def _retrying_damaged(self, attempt: int) -> Iterator[None]:
        """Pauses instead of raising `OtherContent`. Errors of `_ask` pass: it has repeated what may be repeated."""
        try:
            yield
        except OtherContent:
            if attempt < self._body_tries:
                time.sleep(base.PAUSES[0] * 2**attempt)

    def tag(self, key: str) -> str | None:
        """See `ObjectStore.tag`."""
        check_key(key)
        with self._store_errors("read", key):
            description = self._describe(key)
        return None if description is None else description[1]

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`."""
        return self._write(key, data, {}, if_absent=if_absent, if_tag=if_tag)

    def _write(self, key: str, data: bytes, attributes: dict[str, str], *, if_absent: bool, if_tag: str | None) -> str:
        check_key(key)
        digest = hashlib.sha256(data).hexdigest()

        def own() -> str | None:
            with suppress(TooLarge):
                stored = self.read(key, max_bytes=len(data))
                return stored.tag if stored is not None and stored.data == data else None
            return None

        return self._put(key, data, {**attributes, _SHA256: digest}, self._mode(if_absent, if_tag), own_tag=own)

    def _mode(self, if_absent: bool, if_tag: str | None) -> Any:  # noqa: FBT001 - as the operations have them
        """The condition of a write, as obstore has it."""
        return "create" if if_absent else "overwrite" if if_tag is None else self._version_condition(if_tag)

    def _put(
        self,
        key: str,
        body: Any,
        attributes: dict[str, str],
        mode: Any,
        *,
        own_tag: Callable[[], str | None],
        client: Any = None,
    ) -> str:
        """One request that writes an object; returns its tag.

        A conditional write that is repeated because its answer was lost may be refused because its own first try
        succeeded. `own_tag` detects this by the content: it returns the object's tag if the content is that of this
        write.
        """
        self._check_encryption()
        tries = 0
        with self._store_errors("write", key):
            while True:
                try:
                    answer = ask_once(
                        obstore.put,
                        client or self._client,
                        self._root + key,
                        body,
                        attributes=attributes,
                        mode=mode,
                        use_multipart=False,
                    )
                except FAILURES as error:
                    if not is_failed_condition(error) and not isinstance(error, Missing):
                        tries = pause_or_raise(tries, error, self._options.retries)
                        continue
                    # A 404 means that a version is gone only if a version was requested, and the store confirms it.
                    missing = isinstance(error, Missing)
                    if mode == "overwrite" or (missing and (mode == "create" or self._get(key) is not None)):
                        raise
                    if tries > 0 and (tag := own_tag()) is not None:
                        return tag
                    raise conflict(f"{self.uri}/{key}") from None
                else:
                    # An answer without a version: the present content shows whether the write took place.
                    if (tag := self._tag(answer) or own_tag()) is not None:
                        return tag
                    break
        raise Unreachable(
            f"{self.uri}/{key}: cannot write: the answer is not one of such a store; check the endpoint and proxies"
        )

    def _ask(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Sends a request that may be repeated, as often as settings say; raises what `ask` does."""
        return ask(function, *arguments, retries=self._options.retries, **options)

    def _check_encryption(self) -> None:
        """Refuses a KMS key: ignoring it would leave objects encrypted with another key than the settings name."""
        if self._options.kms_key_id:
            what = f"is only for s3://; remove it, and set a default key for the bucket of {self.scheme}://"
            raise SettingsError([Problem("JOB_STORAGE__KMS_KEY_ID", what)])

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_tag: str | None = None) -> None:
        """See `ObjectStore.upload`. Above 256 MiB a condition is checked right before the upload, not by the store."""
        check_key(key)
        # Small objects are rewritten and read again: cold storage is for files.
        cold = {"Storage-Class": self._options.storage_class} if self._options.storage_class else {}
        size = path.stat().st_size
        with disk_errors(f"{self.uri}/{key}: cannot read {path}"), self._naming_storage_class():
            if size <= MAX_READ_BYTES:
                self._write(key, path.read_bytes(), cold, if_absent=if_absent, if_tag=if_tag)
                return
            for _ in range(_MAX_CHANGES):
                before = path.stat()
                digest = hash_file(path)
                self._upload(path, key, {**cold, _SHA256: digest}, self._mode(if_absent, if_tag))
                after = path.stat()
                if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                    return
                if_absent, if_tag = False, self.tag(key)  # what this call has written meanwhile is replaced
        raise Unreachable(f"{path} changes at each try while it is uploaded to {self.uri}/{key}")

    @contextmanager
    def _naming_storage_class(self) -> Iterator[None]:
        """Names the setting where the store refuses the class of an upload, of which its answer says no more."""
        try:
            yield
        except SettingsError as error:
            if self._options.storage_class is None or not any(name in str(error) for name in _REFUSED_CLASS):
                raise
            what = f"{self._options.storage_class} is refused; correct or remove it: {error}"
            raise SettingsError([Problem("JOB_STORAGE__STORAGE_CLASS", what)]) from error

    def _upload(self, path: Path, key: str, attributes: dict[str, str], mode: Any) -> None:
        size = path.stat().st_size

        def own() -> str | None:
            description = self._get(key)
            same = description is not None and description.attributes.get(_SHA256) == attributes[_SHA256]
            return self._tag(description.meta) if description is not None and same else None

        if mode != "overwrite" and size <= _MAX_CONDITIONAL_BYTES:
            self._put(
                key,
                path.read_bytes(),
                attributes,
                mode,
                own_tag=own,
                client=self._connect(timeout_factor=size / _PART_BYTES),
            )
            return
        self._check_encryption()
        with self._store_errors("write", key):
            if mode != "overwrite":
                description = self._describe(key)
                known = None if mode == "create" else mode
                if (None if description is None else self._version_condition(description[1])) != known:
                    raise conflict(f"{self.uri}/{key}")
            # Repeated as a whole, such as when another upload of this key discarded the parts.
            self._ask(
                obstore.put,
                self._repeating_client,
                self._root + key,
                path,
                attributes=attributes,
                use_multipart=True,
                chunk_size=max(_PART_BYTES, -(-size // _MAX_PARTS)),
                max_concurrency=CONNECTIONS // 2,
            )

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """See `ObjectStore.download`."""
        check_key(key)
        with disk_errors(f"{self.uri}/{key}: cannot write {path}"), self._store_errors("read", key):
            earlier_digests: set[str] = set()
            for _ in attempts(repeats=2):
                description = self._describe(key)
                if description is None:
                    raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.uri}/{key}")
                check_size(f"{self.uri}/{key}", description[0]["size"], max_bytes)
                with suppress(OtherContent), atomic_write(path) as temporary:
                    self._fetch(key, temporary, description[0], earlier_digests)
                    return
        raise Unreachable(f"{self.uri}/{key}: cannot read: it changes while it is read, or is cut off")

    def _fetch(self, key: str, path: Path, meta: Any, earlier_digests: set[str]) -> None:
        """Reads an object into a file; `earlier_digests` as for `_read`.

        Raises:
            OtherContent: It is not the one that `meta` describes, or arrived damaged.
        """
        size = meta["size"]
        if size <= _PIECE_BYTES:
            try:
                stored = self.read(key, max_bytes=size)
            except TooLarge:
                raise OtherContent from None
            if stored is None or len(stored.data) != size:
                raise OtherContent
            path.write_bytes(stored.data)
            return
        digests: set[str | None] = set()
        with path.open("wb") as file:

            def fetch_piece(start: int) -> None:
                data, digest = self._fetch_piece(key, meta, start)
                # A disk with room for a part of the piece writes that part, and returns its length.
                if os.pwrite(file.fileno(), data, start) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                digests.add(digest)

            if size > ONE_CONNECTION_BYTES:
                with ThreadPoolExecutor(CONNECTIONS) as pool:
                    list(pool.map(fetch_piece, range(0, size, _PIECE_BYTES)))
            else:
                for start in range(0, size, _PIECE_BYTES):
                    fetch_piece(start)
        if path.stat().st_size != size:
            raise OtherContent
        _check_digest(hash_file(path), digests, earlier_digests)

    def _fetch_piece(self, key: str, meta: Any, start: int) -> tuple[bytes, str | None]:
        """The bytes from `start` on, and the SHA-256 that the whole object has.

        Raises:
            OtherContent: The object is not the one that `meta` describes.
            Unreachable: The bytes arrive cut off.
        """
        end = min(start + _PIECE_BYTES, meta["size"])
        for attempt in self._attempts():
            try:
                answer = self._get(key, range=(start, end), if_match=meta["e_tag"])
            except PreconditionError:
                answer = None
            if answer is None or self._tag(answer.meta) != self._tag(meta):
                raise OtherContent
            with self._retrying_damaged(attempt):
                data = read_body(answer)
                if len(data) == end - start:
                    return data, answer.attributes.get(_SHA256)
                raise OtherContent
        raise Unreachable(f"{self.uri}/{key}: cannot read: the content is cut off")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        check_prefix(prefix)
        any_entry, last = False, ""
        with self._store_errors("list", prefix):
            for key, size in self._entries(self._root + prefix):
                any_entry = True
                name = key.removeprefix(self._root)
                # The consoles keep empty objects, whose names end in a slash that obstore drops, as folders.
                if key == last or ((size == 0 or key < last) and self.tag(name) is None):
                    continue
                if key < last:
                    raise Unreachable(f"{self.uri}/{prefix}: cannot list: the server does not sort by key")
                last = key
                yield ObjectInfo(name, size)
            # The answer of a proxy may look like an empty listing: the store has to confirm that an object does not
            # exist.
            if not any_entry and self._get(f".absent-{uuid4().hex}") is not None:
                raise Unreachable(
                    f"{self.uri}/{prefix}: cannot list: the answers are not those of such a store; "
                    "check the endpoint and proxies"
                )

    def _entries(self, start: str) -> Iterator[tuple[str, int]]:
        # One that is sorted continues behind the last page that came, another one begins again.
        client, retries = self._client if self.sorted_by_key else self._repeating_client, self._options.retries
        return entries(client, self.uri, start, retries=retries, sorted_by_key=self.sorted_by_key)

    def delete(self, key: str, *, if_tag: str | None = None) -> None:
        """See `ObjectStore.delete`."""
        check_key(key)
        with self._store_errors("delete", key):
            if if_tag is None:
                self._delete(self._client, key)
                return
            try:
                self._delete_version(key, if_tag)
            except Conflict:
                if self._describe(key) is not None:
                    raise

    def _delete(self, client: Any, key: str) -> None:
        try:
            self._ask(obstore.delete, client, self._root + key)
        except Missing:
            if self._get(key) is not None:  # then the answer was not the store's
                raise

    def conditional_writes(self) -> bool:
        """See `ObjectStore.conditional_writes`."""
        return try_conditional_writes(self)

    def _get(self, key: str, **options: Any) -> Any:
        """Requests an object; None only if the store itself says that there is none, not for a proxy's 404."""
        full_key = self._root + key
        for _ in attempts(repeats=2):
            try:
                return self._ask(obstore.get, self._client, full_key, options=options)
            except Missing as error:
                if code(error) in ABSENT:
                    return None
                if code(error):
                    raise
                # Without the store's error code another request has to confirm it.
                if all(name != full_key for name, _ in self._entries(full_key)):
                    return None
                missing = error  # or it was written meanwhile
        raise missing

    def _describe(self, key: str) -> tuple[Any, str] | None:
        """What obstore says of an object, and its tag, None if it is absent.

        The answer to a failed HEAD has no error code, so the object is requested.
        """
        for _ in attempts(repeats=2):
            try:
                meta = self._ask(obstore.head, self._client, self._root + key)
            except FAILURES as error:
                if not is_client_error(error):
                    raise
                result = self._get(key)
                if result is None:
                    return None
                meta = result.meta
            if (tag := self._tag(meta)) is not None:
                return meta, tag
        raise Unreachable(
            f"{self.uri}/{key}: cannot read: the answer is not one of such a store: it has no "
            "version; check the endpoint and proxies"
        )

    @contextmanager
    def _store_errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            raise translate(error, f"{self.uri}/{key}: cannot {verb}") from error


def _check_digest(digest: str, expected: set[str | None], earlier_digests: set[str]) -> None:
    """Raises `OtherContent` if content does not fit its metadata, unless it arrived like this before."""
    if not expected <= {None, digest} and digest not in earlier_digests:
        earlier_digests.add(digest)
        raise OtherContent
