"""Registries that misbehave: a push ends with a JobError or one complete version; secrets are not sent elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from job.errors import AccessDenied, JobError, SettingsError, Unreachable
from job.push import oci
from job.push.files import PushContent
from job.push.oci import OciTarget
from job.push.oci_image import image_digest
from tests.dataset_hub import serving
from tests.unit.push.test_oci import written

PASSWORD = "a-password-that-stays-at-home"
TOKEN = "a-token-that-stays-at-home"


@dataclass
class State:
    """What a registry holds, and how it answers.

    Attributes:
        blobs: By digest.
        manifests: By `repository:reference`.
        uploads: Bytes of the uploads that are going on.
        login: What it wants as `Authorization: Basic`; None for nothing.
        answer: (handler, method, path) -> whether it has answered in its own, bad way.
        seen: (method, path, Authorization) of every request.
        bearer: Whether it wants a token, and where from.
        token: The one that it takes.
        told: The digest that it tells of every manifest; None for the right one.
    """

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    answer: Callable[[Any, str, str], bool] = lambda _handler, _method, _path: False
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)
    login: str | None = None
    bearer: str | None = None
    token: str = TOKEN
    told: str | None = None


class Registry(BaseHTTPRequestHandler):
    """The distribution protocol, as far as pushes speak it.

    As real registries do, it refuses a manifest that names what it does not hold, or comes with another media type,
    hides an index from clients that do not accept one, and wants the media type of bytes with every upload.
    """

    state: State
    protocol_version = "HTTP/1.1"

    def handle_one(self) -> None:
        """Answers a request."""
        parts, state = urlsplit(self.path), self.state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        state.seen.append((self.command, parts.path, self.headers.get("Authorization")))
        if state.answer(self, self.command, parts.path):
            return
        if parts.path == "/token":
            self.reply(200, {"token": state.token})
        elif (challenge := self._challenge()) is not None:
            self.reply(401, {}, {"Www-Authenticate": challenge})
        elif parts.path == "/v2/":
            self.reply(200, {})
        elif (found := re.fullmatch(r"/v2/lab/model/blobs/(sha256:\w+)", parts.path)) is not None:
            self.reply(200 if found[1] in state.blobs else 404)
        elif parts.path == "/v2/lab/model/blobs/uploads/":
            name = f"u{len(state.seen)}"
            state.uploads[name] = b""
            self.reply(202, None, {"Location": f"/v2/lab/model/blobs/uploads/{name}"})
        elif parts.path.startswith("/v2/lab/model/blobs/uploads/"):
            self._upload(parts.path.rpartition("/")[2], parse_qs(parts.query), body)
        else:
            self._manifest(parts.path.rpartition("/")[2], body)

    def _challenge(self) -> str | None:
        state, given = self.state, self.headers.get("Authorization")
        if state.login is not None and given != f"Basic {state.login}":
            return 'BASIC realm="here"'
        if state.bearer is not None and given != f"Bearer {state.token}":
            return f'Bearer realm="{state.bearer}/token",service="r",scope="repository:lab/model:pull,push"'
        return None

    def _upload(self, name: str, query: dict[str, list[str]], body: bytes) -> None:
        if self.command == "DELETE":
            del self.state.uploads[name]
            self.reply(204)
            return
        if body and self.headers.get("Content-Type") != "application/octet-stream":
            self.reply(400, {"errors": [{"code": "BLOB_UPLOAD_INVALID"}]})
            return
        whole = self.state.uploads[name] = self.state.uploads[name] + body
        if self.command == "PATCH":
            self.reply(202, None, {"Location": self.path.partition("?")[0], "Range": f"0-{len(whole) - 1}"})
            return
        (digest,) = query["digest"]
        if f"sha256:{hashlib.sha256(whole).hexdigest()}" != digest:
            self.reply(400, {"errors": [{"code": "DIGEST_INVALID"}]})
            return
        self.state.blobs[digest] = whole
        self.reply(201, None, {"Location": f"/v2/lab/model/blobs/{digest}"})

    def _manifest(self, reference: str, body: bytes) -> None:
        if self.command == "PUT":
            facts = json.loads(body)
            named = [facts["config"], *facts["layers"]] if "config" in facts else facts["manifests"]
            there = self.state.blobs if "config" in facts else self.state.manifests
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            if self.headers.get("Content-Type") != facts["mediaType"] or (":" in reference and reference != digest):
                self.reply(400, {"errors": [{"code": "MANIFEST_INVALID"}]})
            elif any(one["digest"] not in there for one in named):
                self.reply(400, {"errors": [{"code": "MANIFEST_BLOB_UNKNOWN"}]})
            else:
                self.state.manifests[reference] = body
                self.reply(201, None, {"Docker-Content-Digest": self._digest(body)})
            return
        held = self.state.manifests.get(reference)
        if held is None or json.loads(held)["mediaType"] not in self.headers.get("Accept", ""):
            self.reply(404)
        else:
            self.reply(200, None, {"Docker-Content-Digest": self._digest(held)})

    def _digest(self, data: bytes) -> str:
        return self.state.told or f"sha256:{hashlib.sha256(data).hexdigest()}"

    def reply(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        """Sends an answer."""
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), "Retry-After": "0", **(headers or {})}.items():
            if text:
                self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def __getattr__(self, name: str) -> Any:
        """All methods alike: the server looks for `do_GET` and the like."""
        if name.startswith("do_"):
            return self.handle_one
        raise AttributeError(name)

    def log_message(self, *_args: object) -> None:
        """Keeps quiet."""


@contextmanager
def registry(state: State, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Its address, host and port."""
    with serving(type("Own", (Registry,), {"state": state}), tls) as address:
        yield address.removeprefix("http://")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No waiting between tries, no credentials of this machine, small chunks."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    monkeypatch.setattr(oci, "_CHUNK", 4096)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OCI_USERNAME", "OCI_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


def content(folder: Path) -> PushContent:
    """The three files of test_oci; copies are made for every push, which removes them."""
    folder.mkdir(exist_ok=True)
    files, _ = written(folder / "files")

    def fetch(file: Any, _work: Path) -> Path:
        return written(folder / "work")[1][file.path]

    return PushContent("first", files, fetch, lambda: None, folder)


def expected(folder: Path) -> str:
    """The digest of the whole image."""
    files, copies = written(folder / "expected")
    return image_digest(files, copies, "first", content(folder).sha256)


def pushed(address: str, folder: Path) -> str:
    """Pushes, and returns the digest."""
    return OciTarget(f"{address}/lab/model:first").push(content(folder))


def test_a_push_and_the_same_again(tmp_path: Path) -> None:
    """In several chunks, once: a second push uploads nothing and moves no tag."""
    state = State()
    with registry(state) as address:
        assert pushed(address, tmp_path) == expected(tmp_path)
        assert "PATCH" in {method for method, _, _ in state.seen}
        before = len(state.seen)
        assert pushed(address, tmp_path) == expected(tmp_path)
        assert {method for method, _, _ in state.seen[before:]} <= {"GET", "HEAD"}


def test_a_token_is_got_where_the_registry_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """401 with a bearer challenge: the password goes to the realm alone, the registry gets the token."""
    monkeypatch.setenv("OCI_USERNAME", "me")
    monkeypatch.setenv("OCI_PASSWORD", PASSWORD)
    state = State()
    with registry(state) as address:
        state.bearer = f"http://{address}"
        assert pushed(address, tmp_path) == expected(tmp_path)
    encoded = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    for _, path, authorization in state.seen:
        if path != "/token":
            assert encoded not in (authorization or ""), path
    assert any(path == "/token" for _, path, _ in state.seen)


@contextmanager
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[State, State, str, str]]:
    """A registry that wants credentials, and another host: the state of both, and the address of each."""
    monkeypatch.setenv("OCI_USERNAME", "me")
    monkeypatch.setenv("OCI_PASSWORD", PASSWORD)
    state, other = State(), State()
    with registry(state) as address, registry(other) as listens:
        state.bearer = f"http://{address}"
        yield state, other, address, listens.replace("127.0.0.1", "localhost")


@pytest.mark.parametrize("at", ["GET /v2/", "POST", "PATCH", "manifests"])
def test_a_redirect_to_another_host_gets_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Wherever a registry redirects to another host, neither password nor token goes there."""
    with two_hosts(monkeypatch) as (state, other, address, foreign):

        def redirects(handler: Any, method: str, path: str) -> bool:
            if at not in f"{method} {path}" or handler.headers.get("Authorization") is None:
                return False
            handler.reply(307, None, {"Location": f"http://{foreign}{handler.path}"})
            return True

        state.answer = redirects
        said = ""
        try:
            pushed(address, tmp_path)
        except JobError as error:
            said = str(error)
    assert PASSWORD not in said
    assert TOKEN not in said
    assert [authorization for _, _, authorization in other.seen if authorization] == []


@pytest.mark.parametrize("asks", [False, True])
def test_an_upload_location_on_another_host_gets_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, asks: bool
) -> None:
    """An upload may be sent to another host, such as a bucket: it gets the bytes, and neither password nor token.

    Nor does a host that asks for them, and names itself as the place to get a token from.
    """
    with two_hosts(monkeypatch) as (state, other, address, foreign):
        other.bearer = f"http://{foreign}" if asks else None

        def elsewhere(handler: Any, method: str, _path: str) -> bool:
            if method != "POST" or handler.headers.get("Authorization") != f"Bearer {TOKEN}":
                return False
            other.uploads["u"] = b""
            handler.reply(202, None, {"Location": f"http://{foreign}/v2/lab/model/blobs/uploads/u"})
            return True

        state.answer = elsewhere
        with pytest.raises(JobError):  # the blobs are elsewhere, but this host has more than one to get
            pushed(address, tmp_path)
    assert [authorization for _, _, authorization in other.seen if authorization] == []


@pytest.mark.parametrize("status", [404, 405, 411, 415, 416, 501])
def test_a_registry_without_chunked_uploads_gets_whole_ones(tmp_path: Path, status: int) -> None:
    """What is refused in chunks is sent in one request; the version is the same."""
    state = State()

    def no_chunks(handler: Any, method: str, _path: str) -> bool:
        if method != "PATCH":
            return False
        handler.reply(status, {"errors": [{"code": "UNSUPPORTED"}]})
        return True

    state.answer = no_chunks
    with registry(state) as address:
        assert pushed(address, tmp_path) == expected(tmp_path)


def test_a_wrong_digest_is_no_success(tmp_path: Path) -> None:
    """A registry that tells another digest than that of what was sent: no push is reported as done."""
    state = State(told="sha256:" + "0" * 64)
    with registry(state) as address, pytest.raises(Unreachable, match="was moved to sha256:0000"):
        pushed(address, tmp_path)


@pytest.mark.parametrize(("status", "code"), [(400, "DIGEST_INVALID"), (413, "SIZE_INVALID")])
def test_bytes_that_do_not_arrive_are_no_success(tmp_path: Path, status: int, code: str) -> None:
    """The registry says that a blob is not what it was to be, or too large: an error with its code, no tag."""
    state = State()

    def refuses(handler: Any, method: str, path: str) -> bool:
        if method != "PUT" or "/blobs/" not in path:
            return False
        handler.reply(status, {"errors": [{"code": code}]})
        return True

    state.answer = refuses
    with registry(state) as address, pytest.raises(SettingsError, match=code):
        pushed(address, tmp_path)
    assert state.manifests == {}


@pytest.mark.long
def test_a_registry_that_dies_at_each_request(tmp_path: Path) -> None:
    """Every request in turn is the last that is answered; the next attempt ends with one tag, on the complete image."""
    whole = expected(tmp_path)
    for at in range(1, 60):
        state = State()

        def dies(handler: Any, _method: str, _path: str, at: int = at, state: State = state) -> bool:
            if len(state.seen) < at:
                return False
            handler.reply(403)
            return True

        state.answer = dies
        with registry(state) as address:
            try:
                pushed(address, tmp_path)
            except AccessDenied:
                assert "first" not in state.manifests or hashlib.sha256(
                    state.manifests["first"]
                ).hexdigest() == whole.removeprefix("sha256:")
            else:
                break
            state.answer = State().answer
            assert pushed(address, tmp_path) == whole
            tags = [name for name in state.manifests if not name.startswith("sha256:")]
            assert tags == ["first"]
    assert at > 8
