"""Pushes to registries that speak the protocol: what is asked, with which credentials, and what is on the disk."""

from __future__ import annotations

import base64
import errno
import json
import re
import ssl
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from job.errors import AccessDenied, JobError, SettingsError, Unreachable
from job.push import oci, oci_image
from job.push.files import PushFile
from job.push.oci import OciTarget
from tests.unit.push.test_oci_attacks import (
    PASSWORD,
    TOKEN,
    State,
    _quick,  # noqa: F401 - a fixture
    content,
    expected,
    pushed,
    registry,
)
from tests.unit.tracking.test_kubernetes_progress import files as certificate  # noqa: F401 - a fixture

LOGIN = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
TAG = "127.0.0.1:5000/lab/model:first"


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name and password for the registry."""
    monkeypatch.setenv("OCI_USERNAME", "me")
    monkeypatch.setenv("OCI_PASSWORD", PASSWORD)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, URL, options) of every request."""
    request, found = requests.Session.request, list[tuple[str, str, dict[str, Any]]]()

    def spy(self: requests.Session, method: str, url: str, **options: Any) -> requests.Response:
        found.append((method, url, options))
        return request(self, method, url, **options)

    monkeypatch.setattr(requests.Session, "request", spy)
    return found


def refusing(status: int, wanted: str) -> Callable[[Any, str, str], bool]:
    """Refuses requests whose method or path this is."""

    def answer(handler: Any, method: str, path: str) -> bool:
        if wanted not in f"{method} {path}":
            return False
        handler.reply(status, {"errors": [{"code": "UNSUPPORTED"}]})
        return True

    return answer


def test_the_check_takes_its_upload_back(logged_in: None) -> None:
    """It proves that uploads are accepted, and leaves none; also where the registry gives no address for it."""
    state = State()
    with registry(state) as address:
        state.bearer = f"http://{address}"
        target = OciTarget(f"{address}/lab/model:first")
        assert target.check() == f"{address}/lab/model:first: the registry accepts uploads"
        assert ("DELETE", f"Bearer {TOKEN}") in {(method, authorization) for method, _, authorization in state.seen}
        assert (state.uploads, state.blobs, state.manifests) == ({}, {}, {})
        state.answer = refusing(202, "POST")
        assert "accepts uploads" in target.check()


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.usefixtures("logged_in")
def test_requests_are_bounded_in_time_and_memory(
    tmp_path: Path, sent: list[tuple[str, str, dict[str, Any]]], *, chunks: bool
) -> None:
    """A registry that stops answering is given up; of a large layer only a chunk is in memory, or it is streamed."""
    state = State(answer=(lambda *_: False) if chunks else refusing(405, "PATCH"))
    with registry(state) as address:
        state.bearer = f"http://{address}"
        OciTarget(f"{address}/lab/model:first").check()
        assert pushed(address, tmp_path) == expected(tmp_path)
    limits = [options.get("timeout") for _, url, options in sent if "/v2/" in url]
    assert [limit for limit in limits if limit is None or not all(0 < seconds < 1000 for seconds in limit)] == []
    bodies = [len(options["data"]) for _, _, options in sent if isinstance(options.get("data"), bytes)]
    assert max(bodies) == oci._CHUNK
    patches = [1 for method, _, _ in sent if method == "PATCH"]
    assert len(patches) == (3 if chunks else 1), "what fits into one chunk is sent in one request"


def test_what_a_push_would_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By path in the image: a file is the same if the registry has its layer; nothing is uploaded to find out."""
    monkeypatch.setattr(oci_image, "OWN_LAYER", 500)
    state = State()
    with registry(state) as address:
        target = OciTarget(f"{address}/lab/model:first")

        def changes() -> list[tuple[str, str, int]]:
            return target.changes(content(tmp_path))

        paths = [("models/README.md", 7), ("models/adapter_model.safetensors", 600), ("models/merged/config.json", 2)]
        assert changes() == [("new", *path) for path in paths]
        assert {method for method, _, _ in state.seen} == {"GET", "HEAD"}
        target.push(content(tmp_path))
        assert changes() == [("same", *path) for path in paths]
        adapter = json.loads(state.manifests[json.loads(state.manifests["first"])["manifests"][0]["digest"]])["layers"]
        del state.blobs[adapter[0]["digest"]]
        assert [change for change, _, _ in changes()] == ["same", "new", "same"]


class Stop(BaseException):
    """What the job ends with."""


@pytest.mark.parametrize(("blobs", "manifests"), [(0, 0), (1, 0), (3, 2)])
def test_a_stop_is_seen_before_the_next_upload(tmp_path: Path, blobs: int, manifests: int) -> None:
    """Before a layer is uploaded, after it, and before the tag: nothing more is sent, and the next push ends it."""
    state = State()

    def stop() -> None:
        written = (tmp_path / "layer.tar").exists() or blobs > 0
        if written and (len(state.blobs), len(state.manifests)) == (blobs, manifests):
            raise Stop

    with registry(state) as address:
        target = OciTarget(f"{address}/lab/model:first")
        with pytest.raises(Stop):
            target.push(replace(content(tmp_path), check_stop=stop))
        assert (len(state.blobs), len(state.manifests)) == (blobs, manifests)
        assert "first" not in state.manifests
        assert pushed(address, tmp_path) == expected(tmp_path)


def test_one_layer_at_once_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is uploaded the files in it are gone, and then it is, too: the disk need not hold the run twice."""
    monkeypatch.setattr(oci_image, "OWN_LAYER", 500)
    state, work = State(), tmp_path / "work"
    work.mkdir()
    whole = content(tmp_path / "source")
    seen: dict[str, set[str]] = {}

    def fetch(file: PushFile, folder: Path) -> Path:
        copy = folder / file.path.replace("/", "-")
        copy.write_bytes(whole.fetch(file, folder).read_bytes())
        return copy

    def look(_handler: Any, method: str, path: str) -> bool:
        names = {entry.name for entry in work.iterdir() if len(entry.name) < 64}  # not the configurations
        seen.setdefault("manifests" if "/manifests/" in path else method, set()).update(names)
        return False

    state.answer = look
    with registry(state) as address:
        OciTarget(f"{address}/lab/model:first").push(replace(whole, work=work, fetch=fetch))
    assert seen["POST"] == seen["PUT"] == {"layer.tar"}
    assert seen["manifests"] == set()


@pytest.mark.parametrize(
    ("reference", "plain"),
    [
        ("localhost:5000/model:1", True),
        ("127.3.0.1:5000/model:1", True),
        ("127.0.0.1/model:1", True),
        ("[::1]:5000/model:1", True),
        ("localhost.example:5000/model:1", False),
        ("127.0.0.1.example/model:1", False),
        ("10.0.0.1:5000/model:1", False),
        ("ghcr.io/lab/model:1", False),
    ],
)
def test_registries_without_tls(reference: str, *, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this machine; others only where a setting says so."""
    monkeypatch.setattr(oci, "_connect", lambda _container, *, plain, answer_seconds: plain)
    assert OciTarget(reference)._registry()[0] is plain
    assert OciTarget(reference, plain_http=True)._registry()[0] is True


def test_a_registry_without_tls_is_told_from_an_unknown_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice is the setting, and no file of certificates."""
    monkeypatch.setattr(oci, "_LOCAL", re.compile("nothing"))
    with registry(State()) as address:
        with pytest.raises(SettingsError, match=r"SSLError: is it a registry with TLS\? See JOB_EXPORT__OCI_PLAIN_H"):
            OciTarget(f"{address}/lab/model:first").check()
        assert "accepts" in OciTarget(f"{address}/lab/model:first", plain_http=True).check()


def test_a_port_that_is_none() -> None:
    """It is a setting that is wrong, and no registry that is away."""
    with pytest.raises(SettingsError, match=r"127\.0\.0\.1:99999/lab/model:first: InvalidURL"):
        OciTarget("127.0.0.1:99999/lab/model:first").check()


def test_addresses_of_one_place() -> None:
    """Credentials go where scheme, host and port are the registry's, with the default port written or not."""
    one = [oci._host(url) for url in ("https://a/v2/", "https://A:443/x", "https://a")]
    others = ["http://a/", "http://a:443/", "https://a:8443/", "https://b/", "https://a.b/", "http://a:80/"]
    assert len(set(one)) == 1
    assert one[0] not in {oci._host(url) for url in others}
    assert oci._host("http://a") == oci._host("http://a:80/v2/")


def client() -> Any:
    """One that asks nothing here."""
    return oci._client_class(("https", "ghcr.io", 443))()


@pytest.mark.parametrize(
    ("reference", "key"),
    [
        ("docker.io/me/model:1", "https://index.docker.io/v1/"),
        ("index.docker.io/me/model:1", "https://index.docker.io/v1/"),
        ("registry-1.docker.io/me/model:1", "https://index.docker.io/v1/"),
        ("ghcr.io/me/model:1", "ghcr.io"),
        ("127.0.0.1:5000/model:1", "127.0.0.1:5000"),
    ],
)
def test_the_login_of_docker(tmp_path: Path, reference: str, key: str) -> None:
    """It is found under the name that `docker login` gives it; two variables come before it, and one is none."""
    (tmp_path / "config.json").write_text(json.dumps({"auths": {key: {"auth": LOGIN}, "other": {"auth": "x"}}}))
    container, environ = oci._parse(reference), {"DOCKER_CONFIG": str(tmp_path)}
    assert (container.registry == "registry-1.docker.io") == ("docker.io" in reference)
    for variables, login in (
        ({}, LOGIN),
        ({"OCI_USERNAME": "you"}, LOGIN),
        ({"OCI_PASSWORD": "b"}, LOGIN),
        ({"OCI_USERNAME": "you", "OCI_PASSWORD": "b"}, base64.b64encode(b"you:b").decode()),
    ):
        found = client()
        oci._set_credentials(found, container, {**environ, **variables})
        assert found.auth._basic_auth == login


def test_a_registry_that_wants_name_and_password(
    tmp_path: Path, logged_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request has them, however the challenge is written; wrong ones and none are denied access."""
    state = State(login=LOGIN)
    with registry(state) as address:
        assert pushed(address, tmp_path) == expected(tmp_path)
        assert {authorization for _, path, authorization in state.seen if path != "/v2/"} == {f"Basic {LOGIN}"}
        for name, value in (("OCI_PASSWORD", "another"), ("OCI_USERNAME", "")):
            monkeypatch.setenv(name, value)
            with pytest.raises(AccessDenied, match=r"may not push there \(HTTP 401\); log in with docker login"):
                OciTarget(f"{address}/lab/model:first").check()


def test_one_token_is_enough_without_a_password(tmp_path: Path) -> None:
    """A registry that gives anybody a token is asked for it once."""
    state = State()
    with registry(state) as address:
        state.bearer = f"http://{address}"
        assert pushed(address, tmp_path) == expected(tmp_path)
    assert [path for _, path, _ in state.seen].count("/token") == 1


@pytest.mark.parametrize("challenge", ['Bearer service="r"', 'Bearer realm="{url}/page"', "Bearer", ""])
@pytest.mark.parametrize("login", [True, False])
def test_a_token_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, challenge: str, *, login: bool) -> None:
    """A challenge that says nothing of use, and a page in place of a token: access is denied."""
    if login:
        monkeypatch.setenv("OCI_USERNAME", "me")
        monkeypatch.setenv("OCI_PASSWORD", PASSWORD)
    state = State()

    def answer(handler: Any, _method: str, path: str) -> bool:
        if path == "/page":
            handler.reply(200)
            return True
        handler.reply(401, {}, {"Www-Authenticate": challenge.format(url=f"http://{address}")})
        return True

    state.answer = answer
    with registry(state) as address, pytest.raises(AccessDenied, match="HTTP 401"):
        OciTarget(f"{address}/lab/model:first").check()


@pytest.mark.parametrize("at", ["PATCH", "PUT", "HEAD"])
@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.usefixtures("logged_in")
def test_a_token_that_ends_during_the_push(tmp_path: Path, at: str, *, chunks: bool) -> None:
    """A new one is got, and the request sent again, whole: also where a layer was streamed from the disk."""
    state = State()

    def ends(handler: Any, method: str, path: str) -> bool:
        if method == at and state.token == TOKEN and len(state.seen) > 4:
            state.token = "another-token"
        return not chunks and refusing(405, "PATCH")(handler, method, path)

    state.answer = ends
    with registry(state) as address:
        state.bearer = f"http://{address}"
        assert pushed(address, tmp_path) == expected(tmp_path)
    assert state.token != TOKEN
    assert [path for _, path, _ in state.seen].count("/token") == 2


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize("chunks", [True, False])
def test_a_registry_that_is_busy_once_at_each_request(tmp_path: Path, status: int, *, chunks: bool) -> None:
    """Every request is tried again, with its whole body, and the push ends as if nothing had been."""
    state, busy = State(), set[tuple[str, str]]()

    def answer(handler: Any, method: str, path: str) -> bool:
        if path != "/v2/" and (method, path) not in busy:
            busy.add((method, path))
            handler.reply(status, None, {"Retry-After": ""})
            return True
        return not chunks and refusing(405, "PATCH")(handler, method, path)

    state.answer = answer
    with registry(state) as address:
        assert pushed(address, tmp_path) == expected(tmp_path)
    assert {method for method, _ in busy} == {"HEAD", "POST", "PATCH", "PUT"}


def test_a_registry_that_stays_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, longer each time, and then named with its answer."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    state = State(answer=refusing(503, "POST"))
    with registry(state) as address, pytest.raises(Unreachable, match="the registry answered with HTTP 503"):
        pushed(address, tmp_path)
    assert [method for method, _, _ in state.seen].count("POST") == 6
    assert pauses == sorted(pauses)
    assert 10 < sum(pauses) < 60


@pytest.mark.parametrize("path", ["HEAD /v2/lab/model/blobs", "HEAD /v2/lab/model/manifests"])
@pytest.mark.parametrize(("status", "kind"), [(500, Unreachable), (401, AccessDenied), (403, AccessDenied)])
def test_a_registry_that_does_not_say_what_it_holds(
    tmp_path: Path, path: str, status: int, kind: type[JobError]
) -> None:
    """An error in place of yes or no is not taken for a no."""
    state = State(answer=refusing(status, path))
    with registry(state) as address, pytest.raises(kind, match=f"HTTP {status}"):
        pushed(address, tmp_path)
    assert state.manifests == {}


@pytest.mark.parametrize("status", [400, 413, 500])
def test_a_chunk_that_is_refused_for_another_reason(tmp_path: Path, status: int) -> None:
    """The layer is not sent again as a whole."""
    state = State(answer=refusing(status, "PATCH"))
    with registry(state) as address, pytest.raises(Unreachable if status == 500 else SettingsError):
        pushed(address, tmp_path)
    assert state.blobs == {}


def test_an_upload_without_an_address(tmp_path: Path) -> None:
    """A registry that does not say where to upload to is not one that can be used now."""
    state = State(answer=refusing(202, "POST"))
    with registry(state) as address, pytest.raises(Unreachable, match="ValueError"):
        pushed(address, tmp_path)


@pytest.mark.parametrize(
    "body", ["a page", [], {}, {"errors": None}, {"errors": 5}, {"errors": ["x"]}, {"errors": [{"code": "NAME"}]}]
)
@pytest.mark.parametrize("status", [400, 404])
def test_what_a_registry_says_of_a_refusal(body: Any, status: int) -> None:
    """Its codes, if it gives any; and where there is no such repository, what to do."""
    state = State(answer=lambda handler, method, _path: method == "POST" and not handler.reply(status, body))
    with registry(state) as address, pytest.raises(SettingsError) as caught:
        OciTarget(f"{address}/lab/model:first").check()
    (problem,) = caught.value.problems
    said = problem.what.partition(f"the registry refuses (HTTP {status})")[2]
    codes, _, advice = said.partition(";")
    assert codes.strip() == ("NAME" if "NAME" in str(body) else "")
    assert advice.startswith(" does the repository exist?" if status == 404 else "")
    assert bool(advice) == (status == 404)


def test_an_authority_of_one_s_own_is_trusted_for_tokens(
    certificate: Path,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
    logged_in: None,
) -> None:
    """The registry's token service has mostly a certificate of the same authority."""
    monkeypatch.setattr(oci, "_LOCAL", re.compile("nothing"))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "ca.crt"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "ca.crt", certificate / "key")
    state = State()
    with registry(state, context) as address:
        state.bearer = f"https://{address}"
        assert "accepts uploads" in OciTarget(f"{address}/lab/model:first").check()


def test_files_of_certificates(tmp_path: Path) -> None:
    """Of several variables the first of these is taken, as requests takes it; an empty one is none."""
    names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
    for name in names:
        (tmp_path / name).touch()
    environ = {name: str(tmp_path / name) for name in names}
    for name in names:
        assert oci._certificates(environ) == str(tmp_path / name)
        environ[name] = ""
    assert oci._certificates(environ) is True


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of this machine, with the file, for a layer and for a configuration."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*_: object) -> None:
        raise full

    state = State()
    with registry(state) as address:
        with monkeypatch.context() as patch:
            patch.setattr(oci, "write_layer", fails)
            with pytest.raises(Unreachable, match=r"cannot write .*layer\.tar"):
                pushed(address, tmp_path)
        source = content(tmp_path)
        copies = {file.path: source.fetch(file, tmp_path) for file in source.files}
        target = OciTarget(f"{address}/lab/model:first")
        monkeypatch.setattr(Path, "write_bytes", fails)
        with pytest.raises(Unreachable, match=r"cannot write .*\.json"):
            target.push(replace(source, fetch=lambda file, _work: copies[file.path]))


def test_a_python_without_oras(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said."""
    monkeypatch.setitem(sys.modules, "oras.provider", None)
    with pytest.raises(SettingsError, match=r"JOB_EXPORT__OCI: needs the package oras.*pip install"):
        OciTarget(TAG).check()
