"""`make servers`: the job against S3 servers that are not like AWS's, each a proxy in front of moto's server.

With each of them the job must complete and verify, the artifacts must be those of a run in a local folder, and it may
take at most `LIMIT` times as long as on moto's server itself.

To add a server: a function that answers a request or returns False to have it passed on, and a line in `SERVERS`.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import re
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[2]))

from job.results.reader import open_run, parse, read_bytes
from job.runs.layout import facts_of
from job.storage.open import StorageOptions
from tests.chaos import hot_forks, small
from tests.s3_server import BUCKET, CREDENTIALS, Request, credentials, moto_server, server

LIMIT = 3.0
SHARE = 0.05
"""Of the connections that are cut."""
SECONDS = 400
_DRAW, _LOCK = random.Random(0), threading.Lock()


def without_conditions(request: Request, _upstream: str) -> bool:
    """As OpenStack Swift: 501 for conditional writes."""
    conditional = request.command in {"PUT", "POST", "DELETE"} and {"If-Match", "If-None-Match"} & set(request.headers)
    if conditional:
        request.refuse(501, "NotImplemented")
    return bool(conditional)


def with_other_words(request: Request, upstream: str) -> bool:
    """404 with another error code for an object that is missing."""
    status, headers, content = forwarded(request, upstream)
    if status == http.HTTPStatus.NOT_FOUND:
        content = b"<html><body>nothing here</body></html>"
        headers = {"Content-Type": "text/html"}
    _send(request, status, headers, content)
    return True


def with_strict_ranges(request: Request, upstream: str) -> bool:
    """400 for a range that goes beyond the end of the object."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return False
    del request.headers["Range"]
    status, headers, content = forwarded(request, upstream)
    first, last = int(asked[1]), int(asked[2] or len(content) - 1)
    if status == http.HTTPStatus.OK and last >= len(content):
        request.refuse(400, "InvalidArgument")
    elif status == http.HTTPStatus.OK:
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        _send(request, http.HTTPStatus.PARTIAL_CONTENT, headers, content[first : last + 1])
    else:
        _send(request, status, headers, content)
    return True


def cutting(request: Request, upstream: str) -> bool:
    """Closes a share of the connections: before the request is carried out, or within its answer, at any byte."""
    with _LOCK:
        cut, before, place = _DRAW.random() < SHARE, _DRAW.random() < 1 / 2, _DRAW.random()
    if not cut:
        return False
    if not before:
        status, headers, content = forwarded(request, upstream)
        lines = [f"HTTP/1.1 {status} OK", *(f"{name}: {value}" for name, value in headers.items())]
        whole = "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content
        request.wfile.write(whole[: int(place * len(whole))])
        request.wfile.flush()
    # with a reset: a client could take a normal close for the end of the answer
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.hang_up()
    return True


SERVERS: Mapping[str, Callable[[Request, str], bool]] = {
    "moto's own": lambda _request, _upstream: False,
    "501 to conditional writes": without_conditions,
    "404 with other words": with_other_words,
    "400 to ranges beyond the end": with_strict_ranges,
    "5 % of connections cut": cutting,
}


def forwarded(request: Request, upstream: str) -> tuple[int, dict[str, str], bytes]:
    """Carries a request out; status, headers without the length, and content."""
    target = urlsplit(upstream)
    connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
    connection.request(request.command, request.path, request.content, dict(request.headers.items()))
    answer = connection.getresponse()
    content = answer.read()
    skip = {"connection", "transfer-encoding", "server", "date", "content-length"}
    headers = {name: value for name, value in answer.getheaders() if name.lower() not in skip}
    if request.command == "HEAD":
        headers["Content-Length"] = answer.getheader("Content-Length", "0")
    connection.close()
    return answer.status, headers, content


def _send(request: Request, status: int, headers: Mapping[str, str], content: bytes) -> None:
    request.answer(status, content, **headers)


@contextmanager
def foreign(upstream: str, peculiar: Callable[[Request, str], bool]) -> Iterator[str]:
    """Runs such a server; yields its address."""

    def answer(request: Request) -> None:
        if not peculiar(request, upstream):
            _send(request, *forwarded(request, upstream))

    with server(answer) as url:
        yield url


def _run(environ: Mapping[str, str], where: str) -> tuple[str, float, dict[str, str]]:
    """What is wrong with a run on that server (empty for nothing), its seconds, and its artifacts."""
    begun = time.monotonic()
    done = hot_forks.run([], {**environ, "JOB_RUN__OUTPUT": where}, timeout=SECONDS)
    seconds = time.monotonic() - begun
    if done.returncode != 0:
        return f"ended with {done.returncode}: {done.stderr.splitlines()[-1][:400]}", seconds, {}
    kept = ("JOB_STORAGE__", "JOB_LOG__")
    reading = {name: value for name, value in environ.items() if not name.startswith("JOB_") or name.startswith(kept)}
    verify = hot_forks.run(["verify", f"{where}/run"], reading, timeout=SECONDS)
    options = StorageOptions(endpoint_url=environ.get("JOB_STORAGE__ENDPOINT_URL"))
    facts = facts_of(parse(read_bytes(open_run(f"{where}/run", options))))
    return "" if verify.returncode == 0 else f"verify {verify.returncode}: {verify.stdout[-600:]}", seconds, facts


def main() -> int:
    """Runs the job on each, and prints the seconds; exit code 1 if a requirement was violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="servers with this in their name")
    only = parser.parse_args().only
    broken, own = 0, 0.0
    with tempfile.TemporaryDirectory(prefix="qlora-job-servers-") as name, credentials(), moto_server() as upstream:
        environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("JOB_")},
            **small.settings(Path(name), rows=24, questions=16),
            "JOB_TRAIN__MAX_STEPS": "8",
            "JOB_RUN__ID": "run",
            **CREDENTIALS,
        }
        hot_forks.heat([])
        wrong, seconds, expected = _run(environ, f"{name}/local")
        print(f"{'local folder':<30} {seconds:6.1f} s  {wrong or 'completes, verifies'}", flush=True)
        for number, (server_name, peculiar) in enumerate(SERVERS.items()):
            if number and only not in server_name:
                continue
            with foreign(upstream, partial(peculiar)) as url:
                wrong, seconds, facts = _run({**environ, "JOB_STORAGE__ENDPOINT_URL": url}, f"s3://{BUCKET}/{number}")
            own = own or seconds
            if not wrong and facts != expected:
                wrong = "another result"
            if not wrong and seconds > LIMIT * own:
                wrong = f"takes more than {LIMIT:g} times as long"
            broken += bool(wrong)
            print(f"{server_name:<30} {seconds:6.1f} s  {wrong or 'completes, verifies, same artifacts'}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
