"""An imitation of Google Cloud Storage: those requests of its XML API that obstore sends, with conditions.

Emulators in packages have the JSON API, or no conditions. Answers follow Google's description of the XML API; tests of
faults can answer in its place.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from itertools import count
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from tests.s3_server import BUCKET, Request, server

TOKEN = "a-token-that-no-message-may-hold"
_PAGE = 100
"""Entries of a page of a listing; Google's have 1000."""


@dataclass
class Object:
    """An object: its bytes, generation and the headers that are returned."""

    data: bytes
    generation: int
    headers: dict[str, str]


@dataclass
class Bucket:
    """The objects of `BUCKET` by key, and unfinished multipart uploads."""

    objects: dict[str, Object] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    generations: Iterator[int] = field(default_factory=lambda: count(1_764_000_000_000_000))
    lock: Any = field(default_factory=Lock)
    requests: list[str] = field(default_factory=list)

    def answer(self, request: Request) -> None:
        """Answers a request."""
        parts = urlsplit(request.path)
        bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.requests.append(f"{request.command} {key}{'?' if query else ''}{'&'.join(query)}")
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            request.refuse(401, "AuthenticationRequired")
        elif bucket != BUCKET:
            request.refuse(404, "NoSuchBucket")
        elif not key:
            self._list(request, query)
        else:
            with self.lock:
                getattr(self, f"_{request.command.lower()}")(request, key, query)

    def _list(self, request: Request, query: dict[str, str]) -> None:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", query.get("start-after", ""))
        keys = sorted(key for key in list(self.objects) if key.startswith(prefix) and key > after)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key].data)}</Size>"
            "<LastModified>2026-11-29T12:54:09.000Z</LastModified></Contents>"
            for key in keys[:_PAGE]
        )
        rest = f"<NextContinuationToken>{escape(keys[_PAGE - 1])}</NextContinuationToken>" if keys[_PAGE:] else ""
        request.answer(200, f"<ListBucketResult>{entries}{rest}</ListBucketResult>".encode())

    def _refuses(self, request: Request, key: str) -> bool:
        """Whether a condition is not met; then it answers so."""
        found, wanted = self.objects.get(key), request.headers.get("x-goog-if-generation-match")
        tag = request.headers.get("If-Match")
        other = wanted is not None and int(wanted) != (found.generation if found else 0)
        other |= tag is not None and (found is None or tag != found.headers["ETag"])
        if other:
            request.refuse(412, "PreconditionFailed")
        return other

    def _store(self, key: str, data: bytes, given: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in given.items() if name.lower().startswith("x-goog-meta-")}
        generation = next(self.generations)
        tag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "x-goog-generation": str(generation)}
        self.objects[key] = Object(data, generation, {**kept, **tag, "Last-Modified": formatdate(usegmt=True)})
        return tag

    def _put(self, request: Request, key: str, query: dict[str, str]) -> None:
        if "partNumber" in query:
            if query["uploadId"] not in self.uploads:
                return request.refuse(404, "NoSuchUpload")
            self.uploads[query["uploadId"]][int(query["partNumber"])] = request.content
            return request.answer(200, ETag=f'"{query["partNumber"]}"')
        if not self._refuses(request, key):
            request.answer(200, **self._store(key, request.content, dict(request.headers)))
        return None

    def _post(self, request: Request, key: str, query: dict[str, str]) -> None:
        if "uploads" in query:
            name = f"upload-{next(self.generations)}"
            self.uploads[name], self.headers[name] = {}, dict(request.headers)
            return request.answer(
                200,
                f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>".encode(),
            )
        parts = self.uploads.pop(query["uploadId"], None)
        if parts is None:
            return request.refuse(404, "NoSuchUpload")
        numbers = [int(number) for number in re.findall(rb"<PartNumber>(\d+)<", request.content)]
        tag = self._store(key, b"".join(parts[number] for number in numbers), self.headers[query["uploadId"]])
        body = f"<CompleteMultipartUploadResult><ETag>{escape(tag['ETag'])}</ETag></CompleteMultipartUploadResult>"
        return request.answer(200, body.encode(), **tag)

    def _get(self, request: Request, key: str, query: dict[str, str]) -> None:
        if (found := self.objects.get(key)) is None:
            return request.refuse(404, "NoSuchKey")
        if self._refuses(request, key):
            return None
        limits = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if limits is None:
            return request.answer(200, found.data, **found.headers)
        start, end = int(limits[1]), min(int(limits[2]) + 1, len(found.data))
        if start >= len(found.data):
            return request.refuse(416, "InvalidRange")
        return request.answer(
            206,
            found.data[start:end],
            **found.headers,
            Content_Range=f"bytes {start}-{end - 1}/{len(found.data)}",
        )

    def _head(self, request: Request, key: str, query: dict[str, str]) -> None:
        if (found := self.objects.get(key)) is None:
            request.answer(404)
        else:
            request.answer(200, Content_Length=str(len(found.data)), **found.headers)

    def _delete(self, request: Request, key: str, query: dict[str, str]) -> None:
        if "uploadId" in query:
            self.uploads.pop(query["uploadId"], None)
            request.answer(204)
        elif key not in self.objects:
            request.refuse(404, "NoSuchKey")
        elif not self._refuses(request, key):
            del self.objects[key]
            request.answer(204)


@contextmanager
def gcs_server(before: Callable[[Request], bool] = lambda _request: False) -> Iterator[Bucket]:
    """Runs an imitation with an empty bucket, and sets the variables with which obstore finds it.

    `before` may answer a request in its place, and returns whether it did.
    """
    bucket = Bucket()

    def answer(request: Request) -> None:
        if not before(request):
            bucket.answer(request)

    with server(answer) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOOGLE_BASE_URL", url)
        patch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)
        yield bucket
