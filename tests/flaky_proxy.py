"""A proxy in front of a store's server that corrupts a share of the requests, with all kinds of network faults."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

WAYS = ("429", "500", "503", "reset", "lost answer", "truncated", "stall")
DAMAGES = ("short", "long", "other tag")
"""Faults that no network causes: a body whose length differs from its headers, and a wrong tag."""


@dataclass
class Flaky:
    """The proxy's address, and its faults by kind."""

    url: str
    done: Counter[str] = field(default_factory=Counter)


def _damaged(way: str, content: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    """An answer with another body or tag; unchanged if the fault is not in `DAMAGES`."""
    if way in {"short", "long"} and content:
        other = content[:-1] if way == "short" else content + b"x"
        return other, {name: value for name, value in headers.items() if name.lower() != "content-length"}
    if way == "other tag":
        return content, {name: '"other"' if name.lower() == "etag" else value for name, value in headers.items()}
    return content, headers


@contextmanager
def flaky(
    upstream: str, *, share: float, stall_seconds: float, seed: int = 0, ways: Sequence[str] = WAYS
) -> Iterator[Flaky]:
    """Runs the proxy; a `share` of the requests fails in one of `ways`; a stall takes `stall_seconds`."""
    draw, lock = random.Random(seed), threading.Lock()

    def next_way() -> str:
        with lock:
            way = draw.choice(ways) if draw.random() < share else "passed"
            state.done[way] += 1
        return way

    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    state = Flaky(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = _handler(upstream, stall_seconds, next_way)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(  # noqa: C901 - one small handler class, with its ways to go wrong
    upstream: str, stall_seconds: float, next_way: Callable[[], str]
) -> type[BaseHTTPRequestHandler]:
    """The handler of one proxy."""
    target = urlsplit(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            way = next_way()
            if way.isdecimal():
                self._answer(int(way), b"", {})
            elif way in {"reset", "stall"}:
                time.sleep(stall_seconds if way == "stall" else 0)
                self.close_connection = True
            else:
                self._pass_on(body, way)

        def _pass_on(self, body: bytes, way: str) -> None:
            status, headers, content = self._forward(body)
            if way == "lost answer":
                self.close_connection = True
            else:
                self._answer(status, *_damaged(way, content, headers), cut=way == "truncated" and len(content) > 1)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 - http.server's names

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
            skip = {"connection", "transfer-encoding", "server", "date"}
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in skip}
            connection.close()
            return answer.status, headers, content

        def _answer(self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
            self.send_response(status)
            known = {name.lower() for name in headers}
            for name, value in headers.items():
                self.send_header(name, value)
            if "content-length" not in known:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Keeps quiet."""

    return Handler
