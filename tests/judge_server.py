"""A server with OpenAI's API that judges by a word, and can return all kinds of wrong answers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Reply = Callable[[str], str]


def longer(text: str) -> str:
    """Prefers the longer answer, and A if both have the same length, or if there are none."""
    first, second = (re.search(rf"<answer {x}>\n(.*)\n</answer {x}>", text, re.DOTALL) for x in "AB")
    if first is None or second is None:
        return "A"
    return "A" if len(first[1]) >= len(second[1]) else "**B**"


class Served:
    """The server's requests, and its next answers: first `codes`, one per request."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.codes: list[int] = []
        self.retry_after: str | None = None
        self.body: bytes | None = None
        self.drip = 0.0
        self.url = ""


@contextmanager
def judge_server(reply: Reply = longer) -> Iterator[Served]:
    """Serves on a free port of this machine."""
    served = Served(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.asked.append(body)
            served.keys.append(self.headers.get("Authorization"))
            code = served.codes.pop(0) if served.codes else 200
            said = {"choices": [{"message": {"content": served.reply(body["messages"][0]["content"])}}]}
            data = json.dumps(said).encode() if served.body is None else served.body
            self.send_response(code)
            if code in {301, 302, 307}:
                self.send_header("Location", f"{served.url}/elsewhere")
            if served.retry_after is not None:
                self.send_header("Retry-After", served.retry_after)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for byte in data if served.drip else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(served.drip)
            if not served.drip:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            return

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # the client has gone
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
