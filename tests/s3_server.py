"""Servers on real sockets with S3's protocol: moto's, and one whose answers a test determines."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib import request

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
SECRET = "a-secret-that-no-message-may-hold"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
_running: set[str] = set()
"""Addresses of moto's servers."""


class Request(BaseHTTPRequestHandler):
    """A request and methods to answer it; `content` is its body."""

    protocol_version = "HTTP/1.1"
    timeout = 10
    disable_nagle_algorithm = True
    content = b""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer; underscores in the names of headers stand for dashes."""
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        """Send an error in S3's format."""
        self.answer(status, f"<Error><Code>{code}</Code><Message>as the test says</Message></Error>".encode())

    def hang_up(self) -> None:
        """Close the connection; with nothing sent before, the client learns nothing."""
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


@contextmanager
def credentials() -> Iterator[None]:
    """Make boto3 find invented credentials, and none of this machine's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        yield


@contextmanager
def moto_server() -> Iterator[str]:
    """Run moto's server with one empty bucket, `BUCKET`, and yield its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    # moto checks a condition and writes in two steps; S3 does both atomically.
    app, lock = server._server.app, threading.Lock()

    def one_at_a_time(environ: Any, start_response: Any) -> list[bytes]:
        # Before the lock: a client suspended in the middle of a body would block all others.
        body, chunked = environ["wsgi.input"], environ.get("wsgi.input_terminated")
        read = body.read() if chunked else body.read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = BytesIO(read)
        with lock:
            return list(app(environ, start_response))

    server._server.app = one_at_a_time
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    _running.add(url)
    try:
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield url
    finally:
        _running.discard(url)
        if not _running:  # moto keeps its buckets in the process, so the next server would also have these objects
            request.urlopen(request.Request(f"{url}/moto-api/reset", method="POST"), timeout=10).close()
        server.stop()


@contextmanager
def server(answer: Callable[[Request], None]) -> Iterator[str]:
    """Run a server that hands every request to `answer`, and yield its address."""

    class Handler(Request):
        def handle_any(self) -> None:
            self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.handle_any)

    class Server(ThreadingHTTPServer):
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that go away are part of the tests."""

    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()
