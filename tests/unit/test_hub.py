"""Data sets of the hub, against a server on this machine that speaks its protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
FILES = {"data/train.jsonl": b'{"text": "cat"}\n{"text": "mat"}\n'}
REFUSALS = {"gated": (403, "GatedRepo"), "private": (401, ""), "missing": (404, "RepoNotFound"), "down": (500, "")}

# In a process of its own: the hub's libraries read their addresses when they are imported.
CLIENT = """
import json, sys
import datasets
from job.errors import JobError
from job.hub import open_dataset

datasets.disable_progress_bars()
for source, revision, split in json.loads(sys.argv[1]):
    try:
        commit, rows = open_dataset(source, revision, split, source)
        print(json.dumps([commit, [[row.where, row.fields] for row in rows]]))
    except JobError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(BaseHTTPRequestHandler):
    """One data set, `some/good`, with one commit behind `main`; others refuse in their own ways."""

    def do_GET(self) -> None:
        """Answers for metadata, listings and files."""
        path = self.path.split("?")[0]
        repo = next((name for name in REFUSALS if f"datasets/some/{name}" in path), None)
        if repo:
            status, code = REFUSALS[repo]
            self._answer(status, b"{}", {"X-Error-Code": code})
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
def serving() -> Iterator[str]:
    """The address of a hub that runs meanwhile."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask(endpoint: str, home: Path, *questions: tuple[str, str, str], offline: bool = False) -> list[list[object]]:
    """What `open_dataset` says to each (source, revision, split): commit and rows, or the error and its message."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    env = {name: value for name, value in env.items() if name not in {"HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE"}}
    command = [sys.executable, "-c", CLIENT, json.dumps(questions)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """What the job makes of each case, by name; one process asks for all of them."""
    home = tmp_path_factory.mktemp("hub")
    questions = {
        "branch": ("some/good", "main", "train"),
        "commit": ("some/good", COMMIT, "train[1:]"),
        "no such split": ("some/good", COMMIT, "test"),
        "no such revision": ("some/good", "missing", "train"),
        "gated": ("some/gated", "main", "train"),
        "gated commit": ("some/gated", COMMIT, "train"),
        "private": ("some/private", "main", "train"),
        "missing": ("some/missing", "main", "train"),
        "missing commit": ("some/missing", COMMIT, "train"),
        "down": ("some/down", "main", "train"),
    }
    with serving() as endpoint:
        found = dict(zip(questions, ask(endpoint, home, *questions.values()), strict=True))
    offline = {
        "offline": ("some/good", "main", "train"),
        "offline, other commit": ("some/good", OTHER, "train"),
        "offline, unknown": ("some/other", "main", "train"),
    }
    return found | dict(zip(offline, ask("http://127.0.0.1:9", home, *offline.values(), offline=True), strict=True))


def test_a_revision_is_resolved_to_its_commit(answers: dict[str, list[object]]) -> None:
    """A branch gives the rows and the commit it stands for; a commit gives itself, and a slice of a split its rows."""
    rows = [["some/good:row 1", {"text": "cat"}], ["some/good:row 2", {"text": "mat"}]]
    assert answers["branch"] == [COMMIT, rows]
    assert answers["commit"] == [COMMIT, [["some/good:row 1", {"text": "mat"}]]]


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("no such split", "DataError"),
        ("no such revision", "DataError"),
        ("gated", "AccessDenied"),
        ("gated commit", "AccessDenied"),
        ("private", "AccessDenied"),
        ("missing", "AccessDenied"),
        ("missing commit", "AccessDenied"),
        ("down", "Unreachable"),
        ("offline, unknown", "Unreachable"),
    ],
)
def test_the_hubs_errors_are_the_jobs(answers: dict[str, list[object]], case: str, error: str) -> None:
    """A refusal, a silence and wrong data are told apart, and each message names the data set."""
    kind, message = answers[case]
    assert kind == error
    assert "some/" in str(message)


def test_without_the_hub_the_cache_serves_the_same_commit_only(answers: dict[str, list[object]]) -> None:
    """Offline, a pinned data set comes from the cache; another revision of it never stands in."""
    assert answers["offline"] == answers["branch"]
    assert answers["offline, other commit"][0] == "Unreachable"
