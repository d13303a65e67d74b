"""Pushes to a real registry (distribution, as packaged by Debian), and Docker Engine's use of the image."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from job.errors import AccessDenied
from job.push import oci, oci_image
from job.push.oci import OciTarget
from job.push.oci_image import INDEX, MANIFEST
from job.push.push import check_targets, push_run
from job.results.delivery import model_path
from job.results.reader import read_published
from job.storage.local import LocalStore
from job.verification.verify import require_verified, verify
from tests.forked import free_port
from tests.published_run import pairs, publish_run

DOCKER = os.environ.get("DOCKER") or "docker"
USER, PASSWORD = "trainer", "a-password-of-the-registry"
HTPASSWD = "trainer:$2b$05$abcdefghijklmnopqrstuutdet4itF4ObGgnA4Qq64c8TDpSfaMXC"
"""What `htpasswd -B` makes of the password."""


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    """A run with an adapter and a merged model."""
    exported = {"original": [True] * 9 + [False] * 3}
    return LocalStore(publish_run(tmp_path / "first", {"quiz": pairs(12, improved=6)}, exported=exported))


def expected(store: LocalStore) -> dict[str, bytes]:
    """Path in the image, below its folder -> bytes."""
    paths = [artifact["path"] for artifact in read_published(store).results["artifacts"]]
    return {path: Path(store.uri, key).read_bytes() for key in paths if (path := model_path(key)) is not None}


@contextmanager
def registry(folder: Path, log: list[str] | None = None, *, htpasswd: str | None = None) -> Iterator[str]:
    """The address of a registry whose data lies in a folder; `log` is what it is asked for."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    config = folder / "config.yml"
    lines = ["version: 0.1", "storage:", f"  filesystem: {{rootdirectory: {folder}/data}}"]
    lines += ["  delete: {enabled: true}", f"http: {{addr: 127.0.0.1:{port}}}", "log: {accesslog: {disabled: false}}"]
    if htpasswd is not None:
        (folder / "htpasswd").write_text(htpasswd + "\n")
        lines += [f"auth: {{htpasswd: {{realm: here, path: {folder}/htpasswd}}}}"]
    config.write_text("\n".join(lines) + "\n")
    said = (folder / "log").open("w")
    process = subprocess.Popen([os.environ["REGISTRY"], "serve", str(config)], stdout=said, stderr=said)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        said.close()
        if log is not None:
            log += (folder / "log").read_text().splitlines()


def push(store: LocalStore, reference: str, *, again: bool = False) -> str:
    """Pushes a run, and returns the digest."""
    (pushed,) = push_run(store, read_published(store).results, [OciTarget(reference)], again=again)
    return pushed.id


def asked(address: str, path: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an answer of the registry."""
    request = urllib.request.Request(f"http://{address}/v2/{path}", headers={"Accept": f"{INDEX}, {MANIFEST}"})
    with urllib.request.urlopen(request) as answer:
        return answer.read(), dict(answer.headers)


def test_docker_finds_the_files_of_the_run(run: LocalStore, tmp_path: Path) -> None:
    """Pulled by Docker Engine and copied out of a container: the same files, with modes that everybody may read."""
    with registry(tmp_path / "registry") as address:
        reference = f"{address}/lab/model:first"
        assert "accepts uploads" in check_targets([OciTarget(reference)])["JOB_EXPORT__OCI"]
        digest = push(run, reference)
        require_verified(verify(run, tmp_path))
        body, headers = asked(address, "lab/model/manifests/first")
        assert headers["Docker-Content-Digest"] == digest
        assert [one["platform"]["architecture"] for one in json.loads(body)["manifests"]] == ["amd64", "arm64"]
        try:
            subprocess.run([DOCKER, "pull", "-q", reference], check=True, capture_output=True, timeout=60)
            made = subprocess.run(
                [DOCKER, "create", reference, "nothing"], check=True, capture_output=True, text=True, timeout=60
            ).stdout.strip()
            subprocess.run([DOCKER, "cp", f"{made}:/models", str(tmp_path / "out")], check=True, timeout=60)
            subprocess.run([DOCKER, "rm", made], check=True, capture_output=True, timeout=60)
        finally:
            subprocess.run([DOCKER, "rmi", reference], check=False, capture_output=True, timeout=60)
    files = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in files.items()} == expected(run)
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o644}


def test_a_second_push_uploads_nothing(run: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the tag was set, it goes on; pushed again, it sends no blob; the digest is the same elsewhere."""
    log: list[str] = []
    with registry(tmp_path / "registry", log) as address:
        reference = f"{address}/lab/model:first"

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(oci, "_put_manifest", killed)
            with pytest.raises(KeyboardInterrupt):
                push(run, reference)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            asked(address, "lab/model/manifests/first")
        digest = push(run, reference)
        assert push(run, reference, again=True) == digest
    uploads = [line for line in log if '"PUT /v2/lab/model/blobs/uploads' in line]
    assert len(uploads) == 3, "one layer and two configurations, once each"
    assert len([line for line in log if '"PUT /v2/lab/model/manifests/' in line]) == 3
    other = LocalStore(Path(shutil.copytree(run.uri, tmp_path / "other")))
    with registry(tmp_path / "elsewhere") as address:
        assert push(other, f"{address}/another/name:v2") == digest


def test_large_files_have_layers_of_their_own_in_parts(
    run: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With limits as small as these files: a layer for each, uploaded in several requests, with the same content."""
    monkeypatch.setattr(oci_image, "OWN_LAYER", 100)
    monkeypatch.setattr(oci, "_CHUNK", 4000)
    log: list[str] = []
    with registry(tmp_path / "registry", log) as address:
        push(run, f"{address}/lab/model:first")
        index = json.loads(asked(address, "lab/model/manifests/first")[0])
        manifest = json.loads(asked(address, f"lab/model/manifests/{index['manifests'][0]['digest']}")[0])
    assert len(manifest["layers"]) == 3
    assert len([line for line in log if '"PATCH /v2/' in line]) >= 6
    require_verified(verify(run, tmp_path))


def test_credentials_are_those_of_docker(
    run: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused without and with wrong ones; taken from config.json, or from variables; the password is never shown."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with registry(tmp_path / "registry", htpasswd=HTPASSWD) as address:
        target = OciTarget(f"{address}/lab/model:first")
        with pytest.raises(AccessDenied, match="may not push there"):
            check_targets([target])
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (tmp_path / "config.json").write_text(json.dumps({"auths": {address: {"auth": login}}}))
        check_targets([target])
        push(run, target.reference)
        monkeypatch.setenv("OCI_USERNAME", USER)
        monkeypatch.setenv("OCI_PASSWORD", "another-password")
        with pytest.raises(AccessDenied):
            check_targets([target])
        monkeypatch.setenv("OCI_PASSWORD", PASSWORD)
        check_targets([target])
    shown = "".join(capfd.readouterr())
    assert PASSWORD not in shown
    assert login not in shown
