"""An object store in S3, or in a server with its API.

Requests are repeated by botocore, transfers of files (multipart, in parallel) by boto3's transfer manager, credentials
refreshed by both. This file adds conditional writes, confirmed absence, size limits and durable downloads.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from job.common.disk import atomic_write, disk_errors
from job.errors import Unreachable
from job.storage import base
from job.storage.base import (
    CONNECTIONS,
    MAX_BODY_TRIES,
    MAX_READ_BYTES,
    MIB,
    ONE_CONNECTION_BYTES,
    ObjectInfo,
    Stored,
    TooLarge,
    attempts,
    byte_limit,
    check_key,
    check_prefix,
    check_size,
    conflict,
    try_conditional_writes,
)
from job.storage.location import Location, StorageOptions
from job.storage.s3_client import connect
from job.storage.s3_errors import (
    FAILURES,
    TRUNCATED,
    code_and_status,
    is_answer,
    is_missing,
    no_credentials,
    translate,
)

# Bodies are read in pieces of this size, each within the time limit (see `s3_client`).
_CHUNK_BYTES = MIB // 4
# Answers to a condition that a server does not know. Others ignore it.
_UNKNOWN_CONDITION = {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED}


class _OtherSize(Exception):
    """An object has another size than an answer said: it was changed, or the answer was cut within its headers."""


class S3Store:
    """An `ObjectStore` below `prefix` in `bucket`, through a client of `s3_client.connect`."""

    def __init__(self, client: Any, bucket: str, prefix: str, options: StorageOptions) -> None:
        self._client = client
        self._bucket = bucket
        self._root = f"{prefix}/" if prefix else ""
        self._body_tries = min(options.retries, MAX_BODY_TRIES)
        self._options = {"RequestPayer": "requester"} if options.request_payer else {}
        key = options.kms_key_id
        self._write_options = self._options | ({"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {})
        # Small objects are rewritten and read again: cold storage is for files.
        cold = {"StorageClass": options.storage_class} if options.storage_class else {}
        self._file_options = self._write_options | cold
        self.uri = f"s3://{bucket}/{prefix}".removesuffix("/")
        # Conditions of the uploads that go on, by the object's whole key. The transfer manager knows none, so they are
        # added to the one request of an upload that changes the object.
        self._conditions: dict[str, dict[str, str]] = {}
        client.meta.events.register("provide-client-params.s3.CompleteMultipartUpload", self._with_condition)

    @classmethod
    def open(cls, location: Location, options: StorageOptions) -> Self:
        """The store below a prefix; sends nothing.

        Raises:
            SettingsError: The endpoint is no address, or AWS's own configuration is wrong.
        """
        return cls(connect(options), location.bucket, location.key, options)

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """See `ObjectStore.read`."""
        with self._store_errors("read", check_key(key)):
            stored = self._read(key, max_bytes)
        return None if stored is None else Stored(*stored)

    def tag(self, key: str) -> str | None:
        """See `ObjectStore.tag`."""
        with self._store_errors("read", check_key(key)):
            description = self._describe(key)
        return None if description is None else description[1]

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`."""
        return self._write(key, data, self._write_options, if_absent=if_absent, if_tag=if_tag)

    def _write(
        self, key: str, data: bytes, options: Mapping[str, str], *, if_absent: bool = False, if_tag: str | None = None
    ) -> str:
        condition = _condition(if_absent=if_absent, if_tag=if_tag)
        repeated = False
        with self._store_errors("write", check_key(key)):
            for _ in attempts():
                try:
                    return self._put(key, data, {**options, **condition})
                except ClientError as error:
                    absent = if_tag is not None and is_missing(error) and self._is_unlisted(key)
                    if not condition or not (absent or _condition_failed(error, if_tag)):
                        raise
                    repeated |= error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                    if not is_answer(error, "ConditionalRequestConflict"):  # it met another write in flight
                        break
        # A repeated request may have been refused because of what its own first try wrote, whose answer got lost.
        if repeated:
            with suppress(TooLarge):
                stored = self.read(key, max_bytes=len(data))
                if stored is not None and stored.data == data:
                    return stored.tag
        raise conflict(f"{self.uri}/{key}")

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_tag: str | None = None) -> None:
        """See `ObjectStore.upload`."""
        condition = _condition(if_absent=if_absent, if_tag=if_tag)
        size = path.stat().st_size
        if condition and size <= MAX_READ_BYTES:
            with disk_errors(f"{self.uri}/{key}: cannot read {path}"):
                data = path.read_bytes()
            self._write(key, data, self._file_options, if_absent=if_absent, if_tag=if_tag)
            return
        threads = size > ONE_CONNECTION_BYTES
        name = self._root + check_key(key)
        with disk_errors(f"{self.uri}/{key}: cannot read {path}"), self._store_errors("write", key):
            try:
                self._conditions[name] = condition
                self._upload_with_repeats(path, key, threads=threads)
            except S3UploadFailedError as error:
                answer = error.__context__
                if not condition or not isinstance(answer, ClientError):
                    raise
                # A refusal may be our own success, whose answer was lost: a repeated upload then replaces the same
                # content.
                if _condition_failed(answer, if_tag):
                    raise conflict(f"{self.uri}/{key}") from None
                if code_and_status(answer)[1] not in _UNKNOWN_CONDITION:
                    raise
                self._conditions.pop(name, None)
                self._upload_with_repeats(path, key, threads=threads)
            finally:
                self._conditions.pop(name, None)

    def _upload_with_repeats(self, path: Path, key: str, *, threads: bool) -> None:
        for _ in attempts(repeats=2):
            try:
                return self._upload(path, key, threads=threads)
            except RuntimeError:
                # At interpreter shutdown no new thread can be started, but this one can still finish its work.
                threads = False
            except KeyError:
                pass  # an answer lacks what S3's have: the transfer manager does not check for it
            except S3UploadFailedError as error:
                # The answer to "complete" got lost and repeating it finds no upload, or a lifecycle rule removed it.
                if not is_answer(error.__context__, "NoSuchUpload"):
                    raise
        raise Unreachable(f"{self.uri}/{key}: cannot write: the answers are not those of an S3 server")

    def _with_condition(self, params: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {**params, **self._conditions.get(params["Key"], {})}

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """See `ObjectStore.download`."""
        with disk_errors(f"{self.uri}/{key}: cannot write {path}"), self._store_errors("read", check_key(key)):
            for _ in attempts(repeats=2):
                description = self._describe(key)
                if description is None:
                    raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.uri}/{key}")
                size = description[0]
                check_size(f"{self.uri}/{key}", size, max_bytes)
                with suppress(_OtherSize), atomic_write(path) as temporary:
                    self._fetch(key, temporary, size, max_bytes)
                    return
            raise Unreachable(f"{self.uri}/{key}: changed while it was read")

    def _fetch(self, key: str, path: Path, size: int, max_bytes: int | None) -> None:
        """Reads an object into a file.

        Raises:
            _OtherSize: It has not `size` bytes.
        """
        if size > MAX_READ_BYTES:
            try:
                self._client.download_file(
                    self._bucket,
                    self._root + key,
                    str(path),
                    ExtraArgs=self._options,
                    Callback=byte_limit(f"{self.uri}/{key}", max_bytes),
                    Config=self._transfer(threads=size > ONE_CONNECTION_BYTES),
                )
            except KeyError:  # as for uploads
                raise _OtherSize from None
        else:  # the transfer manager would request a range of its part size, which some servers refuse if it is larger
            stored = self._read(key, MAX_READ_BYTES if max_bytes is None else max_bytes)
            path.write_bytes(b"" if stored is None else stored[0])
        if path.stat().st_size != size:
            raise _OtherSize

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`. Keys that end in `/` are the console's folders, not objects."""
        start = self._root + check_prefix(prefix)
        continuation: dict[str, str] = {}
        while True:
            with self._store_errors("list", prefix):
                page = self._page(start, **continuation)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):
                    yield ObjectInfo(entry["Key"].removeprefix(self._root), entry["Size"])
            if not page["IsTruncated"]:
                return
            if page["NextContinuationToken"] == continuation.get("ContinuationToken"):
                raise Unreachable(f"{self.uri}/{prefix}: cannot list: the server repeats the same page")
            continuation = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, start: str, **options: Any) -> Any:
        """Requests a page of a listing; again if the answer is none, because it was cut or is not of an S3 server.

        Raises:
            Unreachable: No answer is a listing. It must not count as an empty one.
        """
        for _ in attempts(repeats=2):
            with suppress(ResponseParserError):
                page = self._client.list_objects_v2(Bucket=self._bucket, Prefix=start, **self._options, **options)
                if _is_listing(page):
                    return page
        raise Unreachable(f"s3://{self._bucket}/{start}: cannot list: the answer is not one of an S3 server")

    def delete(self, key: str, *, if_tag: str | None = None) -> None:
        """See `ObjectStore.delete`."""
        condition = {} if if_tag is None else {"IfMatch": if_tag}
        name = self._root + key
        with self._store_errors("delete", check_key(key)):
            try:
                self._client.delete_object(Bucket=self._bucket, Key=name, **self._options, **condition)
            except ClientError as error:
                if condition and code_and_status(error)[1] == HTTPStatus.NOT_IMPLEMENTED:
                    self._client.delete_object(Bucket=self._bucket, Key=name, **self._options)
                elif condition and _condition_failed(error, None):
                    raise conflict(f"{self.uri}/{key}") from None
                # some servers say that there was none
                elif not is_answer(error, "NoSuchKey") and not (is_missing(error) and self._is_unlisted(key)):
                    raise

    def conditional_writes(self) -> bool:
        """See `ObjectStore.conditional_writes`."""
        return try_conditional_writes(self)

    @contextmanager
    def _store_errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            raise translate(error, f"{self.uri}/{key}: cannot {verb}") from error
        except (OSError, ValueError) as error:
            if (denied := no_credentials(error, f"{self.uri}/{key}: cannot {verb}")) is None:
                raise
            raise denied from error

    def _get(self, key: str, **options: str) -> Any:
        """Requests an object; None only if the store itself says that there is none, not for a proxy's 404.

        `NoSuchKey` means absence. Some servers have other codes for it, or none: then a listing has to confirm it.
        """
        pauses = iter(base.PAUSES[:2])
        while True:
            try:
                return self._client.get_object(Bucket=self._bucket, Key=self._root + key, **self._options, **options)
            except ClientError as error:
                if is_answer(error, "NoSuchKey"):
                    return None
                if not is_missing(error):
                    raise
                # A 404 without an error code, or from a proxy: another request shows which.
                pause = next(pauses, None) if is_answer(error, "404") else None
                if pause is None:
                    if self._is_unlisted(key):
                        return None
                    raise
                time.sleep(pause)

    def _is_unlisted(self, key: str) -> bool:
        """Whether a listing of the store confirms that an object is absent: it would be the first with this prefix."""
        name = self._root + key
        return all(entry["Key"] != name for entry in self._page(name, MaxKeys=1).get("Contents", ()))

    def _read(self, key: str, max_bytes: int) -> tuple[bytes, str] | None:
        attempt = 1
        while answer := self._get(key):
            data, count_bytes = bytearray(), byte_limit(f"{self.uri}/{key}", max_bytes)
            try:
                with closing(answer["Body"]) as body:
                    while chunk := body.read(_CHUNK_BYTES):
                        count_bytes(len(chunk))
                        data += chunk
                if "ETag" in answer and _says_its_length(answer):
                    return bytes(data), answer["ETag"]
                if attempt == self._body_tries:
                    what = "the answer is not one of an S3 server: it has no ETag or no Content-Length"
                    raise Unreachable(f"{self.uri}/{key}: {what}")
            except TRUNCATED:
                if attempt == self._body_tries:
                    raise
            time.sleep(base.PAUSES[0] * 2**attempt)
            attempt += 1
        return None

    def _describe(self, key: str) -> tuple[int, str] | None:
        """An object's size in bytes and its tag, None if it is absent.

        The answer to GET says why it is a 404; the answer to HEAD has no body and could mean a missing bucket.
        """
        for _ in attempts(repeats=2):
            answer = self._get_first_byte(key)
            if answer is None:
                return None
            answer["Body"].close()
            total = str(answer.get("ContentRange", "")).rpartition("/")[2]
            size = total if total.isdecimal() else answer.get("ContentLength")
            if size is not None and "ETag" in answer:
                return int(size), str(answer["ETag"])
        raise Unreachable(f"{self.uri}/{key}: the answer is not one of an S3 server: it has no ETag or no length")

    def _get_first_byte(self, key: str) -> Any:
        """Requests the first byte, or a whole empty object: some servers answer 400 to a range of one."""
        try:
            return self._get(key, Range="bytes=0-0")
        except ClientError as error:
            refused = {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE}
            if code_and_status(error)[1] not in refused and not is_answer(error, "InvalidRange"):
                raise
            return self._get(key)

    def _put(self, key: str, data: bytes, options: Mapping[str, str]) -> str:
        answer = self._client.put_object(Bucket=self._bucket, Key=self._root + key, Body=data, **options)
        if "ETag" in answer:
            return str(answer["ETag"])
        # For any answer, the present content shows whether the write took place.
        stored = self.read(key)
        if stored is None or stored.data != data:
            raise Unreachable(f"{self.uri}/{key}: the answer is not one of an S3 server, and nothing was written")
        return stored.tag

    def _upload(self, path: Path, key: str, *, threads: bool) -> None:
        config = self._transfer(threads=threads)
        name = self._root + key
        self._client.upload_file(str(path), self._bucket, name, ExtraArgs=self._file_options, Config=config)

    def _transfer(self, *, threads: bool) -> Any:
        return TransferConfig(
            use_threads=threads,
            max_concurrency=CONNECTIONS,
            num_download_attempts=self._body_tries,
            io_chunksize=_CHUNK_BYTES,
            preferred_transfer_client="classic",
        )


def _condition(*, if_absent: bool, if_tag: str | None) -> dict[str, str]:
    """The arguments of a conditional write: the store refuses it if another process wrote."""
    return {"IfNoneMatch": "*"} if if_absent else {} if if_tag is None else {"IfMatch": if_tag}


def _is_listing(page: Mapping[str, Any]) -> bool:
    """Whether an answer is a whole page of a listing."""
    entries = all({"Key", "Size"} <= entry.keys() for entry in page.get("Contents", ()))
    return "IsTruncated" in page and entries and (not page["IsTruncated"] or "NextContinuationToken" in page)


def _says_its_length(answer: Mapping[str, Any]) -> bool:
    """Whether an answer that was cut would be noticed: one that ended within its headers looks like an empty object."""
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    return "content-length" in headers or "chunked" in headers.get("transfer-encoding", "")


def _condition_failed(error: ClientError, if_tag: str | None) -> bool:
    """Whether the condition of a write did not hold; servers answer a tag for an absent object with 404."""
    conflicts = {HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED}
    return code_and_status(error)[1] in conflicts or (if_tag is not None and is_answer(error, "NoSuchKey"))
