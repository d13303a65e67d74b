"""A hub on this machine that serves data sets and models by the hub's own protocol."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests import warm

COMMIT = "0123456789abcdef0123456789abcdef01234567"


OTHER = "f" * 40


FILES = {"data/train.jsonl": b'{"text": "cat"}\n{"text": "mat"}\n'}


MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickled",
    "code.py": b"import os",
    "README.md": b"---\nlicense: mit\n---\n",
}


REFUSALS = {
    "gated": (403, "GatedRepo"),
    "private": (401, ""),
    "missing": (404, "RepoNotFound"),
    "down": (500, ""),
    "busy": (429, ""),
    "away": (503, ""),
}


# In a process of its own: the hub's libraries read their addresses when they are imported.
CLIENT = """
import json, sys
import datasets
from job.errors import JobError
from job.data.hub_dataset import open_dataset

datasets.disable_progress_bars()
for source, revision, split in json.loads(sys.argv[1]):
    try:
        commit, rows = open_dataset(source, revision, split, source)
        print(json.dumps([commit, [[row.where, row.fields] for row in rows]]))
    except JobError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(BaseHTTPRequestHandler):
    """A data set `some/good` and models, with one commit behind `main`; others refuse in their own ways."""

    def do_GET(self) -> None:
        """Answers for metadata, listings and files."""
        path = self.path.split("?")[0]
        repo = next((name for name in REFUSALS if f"some/{name}" in path), None)
        if repo:
            status, code = REFUSALS[repo]
            again = {"Retry-After": "0"} if repo in {"busy", "away"} else {}
            self._answer(status, b"{}", {"X-Error-Code": code, **again})
        elif path.startswith(("/api/models/some/", "/some/")):
            self._answer_for_model(path)
        elif path.startswith("/datasets/some/good/resolve/"):
            content = FILES.get(path.split("/", 6)[6])
            headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT}
            self._answer(
                200 if content else 404, content or b"", headers if content else {"X-Error-Code": "EntryNotFound"}
            )
        elif path.startswith("/api/datasets/some/good/tree/"):
            inside = path.endswith("/data")
            files = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": "1"} for name in FILES]
            folder = [{"type": "directory", "path": "data", "oid": "2"}]
            self._answer(200, json.dumps(files if inside else folder).encode())
        elif path.startswith("/api/datasets/some/good") and not path.endswith("/missing"):
            siblings = [{"rfilename": name} for name in FILES]
            self._answer(200, json.dumps({"id": "some/good", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    def _answer_for_model(self, path: str) -> None:
        """`some/huge` says that its weights have 2^60 bytes; everything else is as small as it looks."""
        name = path.rpartition("/")[2]
        if "/tree/" in path:
            sizes = {file: 1 << 60 if "huge" in path and "model" in file else len(MODEL[file]) for file in MODEL}
            files = [{"type": "file", "path": file, "size": size, "oid": file} for file, size in sizes.items()]
            self._answer(200, json.dumps(files).encode())
        elif "/resolve/" in path and name in MODEL:
            huge = {"X-Linked-Size": str(1 << 60)} if "huge" in path and "model" in name else {}
            etag = hashlib.sha256(MODEL[name]).hexdigest() if "weights" in str(MODEL[name]) else name
            body = MODEL[name].replace(b"weights", b"Weights") if "wrong" in path else MODEL[name]
            self._answer(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, **huge})
        elif path.startswith("/api/models/"):
            self._answer(200, json.dumps({"id": "some/model", "sha": COMMIT}).encode())
        else:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self) -> None:
        """Answers as for GET, without the body."""
        self.do_GET()

    def do_POST(self) -> None:
        """Answers which of the paths asked for there are."""
        self.rfile.read(int(self.headers["Content-Length"]))
        files = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": "1"} for name in FILES]
        self._answer(200, json.dumps(files).encode())

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keeps quiet."""


@contextmanager
def serving(hub: type[BaseHTTPRequestHandler] = Hub, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a hub that runs meanwhile."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask(
    endpoint: str,
    home: Path,
    *questions: str | tuple[str, ...],
    client: str = CLIENT,
    offline: bool = False,
    cold: bool = False,
) -> list[list[object]]:
    """What `open_dataset` says to each (source, revision, split): commit and rows, or the error and its message."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    env = {name: value for name, value in env.items() if name not in {"HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE"}}
    if cold:
        command = [sys.executable, "-c", client, json.dumps(questions)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    else:
        done = warm.run([json.dumps(questions)], env, source=client)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
